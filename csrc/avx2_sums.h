// AVX2: sums of 16 bits on their way out, all channels of a pixel at once, while they are in the nearest cache.
#pragma once

#include "kernel_output.h"

namespace foldbit {
namespace {

constexpr int kLookupBlocks = 8;  // of channels, at most, side by side in sums: enough that loading a table is worth it

// The sums of a pixel: [channels] of one plane, and `plane` after that of the next.
struct PixelSums {
  const uint16_t* of;
  int64_t plane;

  template <class P>
  FOLDBIT_INLINE typename P::Ints at(int a, int64_t channel) const {
    return P::from_uint16(of + a * plane + channel);
  }
};

// Integers of whole blocks.
template <class P, int A>
struct IntegerPixels {
  using Block = IntegerOutput<P, A>;
  const Block first;

  IntegerPixels(const Conv& conv, const Place& at, int64_t) : first(conv, at, 0) {}

  void write(int64_t pixel, const PixelSums& sums, int64_t channels) const {
    for (int a = 0; a < A; ++a) {
      int32_t* to = first.out + a * first.plane + pixel * first.pixel;
      for (int64_t c = 0; c < channels; c += kLanes) P::store(to + c, P::matches(first.positions, sums.at<P>(a, c)));
    }
  }
};

// Floats of whole blocks.
template <class P, int A>
struct FloatPixels {
  using Block = FloatOutput<P, A>;
  const FloatOperands from;
  const int64_t pixel_step, scale_step, blocks;
  const int32_t positions;
  alignas(32) float scales[A][kLookupBlocks * kLanes];

  FloatPixels(const Conv& conv, const Place& at, int64_t blocks)
      : from(conv, at, A),
        pixel_step(conv.out_channels),
        scale_step(conv.scale_step),
        blocks(blocks),
        positions(at.positions) {
    find_scales(from.activation_scales);
  }
  void write(int64_t pixel, const PixelSums& sums, int64_t channels) {
    if (scale_step) find_scales(from.activation_scales + pixel * scale_step);
    if (from.residual)
      return from.slopes ? write_as<true, true>(pixel, sums, channels) : write_as<true, false>(pixel, sums, channels);
    return from.slopes ? write_as<false, true>(pixel, sums, channels) : write_as<false, false>(pixel, sums, channels);
  }

 private:
  void find_scales(const float* activation_scales) {
    for (int a = 0; a < A; ++a)
      for (int64_t b = 0; b < blocks; ++b)
        P::store(scales[a] + b * kLanes, P::mul(P::load(from.weight_scales + b * from.weight_scale_step),
                                                P::broadcast(activation_scales[a])));
  }
  // A function of its own, so that its loop has the registers to itself.
  template <bool kResidual, bool kSlopes>
  FOLDBIT_NOINLINE void write_as(int64_t pixel, const PixelSums& pixel_sums, int64_t channels) const {
    const PixelSums sums = pixel_sums;  // copies, which what is written cannot change
    const int64_t offset = pixel * pixel_step;
    float* to = from.out + offset;
    const float* begin = from.bias ? from.bias : to;
    const float *slopes = from.slopes, *residual = kResidual ? from.residual + offset : nullptr;
    const int32_t k = positions;
    const auto low = P::broadcast(from.relu ? 0.0f : -INFINITY);
    for (int64_t c = 0; c < channels; c += kLanes) {
      auto sum = P::load(begin + c);
      FOLDBIT_UNROLL
      for (int a = 0; a < A; ++a)
        sum = P::add(sum, P::mul(P::load(scales[a] + c), P::to_float(P::matches(k, sums.template at<P>(a, c)))));
      sum = P::at_least(sum, low);
      if (kSlopes) sum = P::leaky(sum, P::load(slopes + c));
      if (kResidual) sum = P::add(sum, P::load(residual + c));
      P::store(to + c, sum);
    }
  }
};

// Sums that more words are to be added to stay where they are.
struct NoPixels {
  void write(int64_t, const PixelSums&) const {}
};

// A place's blocks of channels, of all pixels that have the same taps inside the image.
template <template <class, int> class Pixels, class P, int A>
struct PixelOutput {
  Pixels<P, A> whole;
  const typename Pixels<P, A>::Block last;  // where it is incomplete
  const int64_t channels;                   // of whole blocks
  const bool incomplete;

  PixelOutput(const Conv& conv, const Place& at, int64_t blocks)
      : whole(conv, at, blocks),
        last(conv, at, static_cast<int>(blocks - 1)),
        channels(smaller(blocks, at.channels / kLanes) * kLanes),
        incomplete(channels < blocks * kLanes) {}

  void write(int64_t pixel, const PixelSums& sums) {
    whole.write(pixel, sums, channels);
    if (!incomplete) return;
    typename P::Ints planes[A];
    FOLDBIT_UNROLL
    for (int a = 0; a < A; ++a) planes[a] = sums.template at<P>(a, channels);
    last.write(pixel, planes);
  }
};

}  // namespace
}  // namespace foldbit
