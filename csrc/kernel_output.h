// Results on their way out: the integers, or the floats that scales, bias, nonlinearity and shortcut make of them.
#pragma once

#include <math.h>

#include "kernel.h"

namespace foldbit {
namespace {

constexpr int kRowPixels = 64;  // written together, at most: what differs takes up to half of a nearest cache

// Where results go.
struct Place {
  int64_t pixel;        // index of the first output pixel, over images, rows and columns
  int64_t channel;      // first output channel
  int64_t first_block;  // index into scales and bias: group * blocks + block
  int64_t channels;     // of the group, from `channel` on
  int weight_plane, activation_plane;
  int64_t segment;
  const float* scales;  // the first pixel's activation scales, at activation_plane
  int32_t positions;    // that were compared: taps inside the image times channels

  int lanes(int block) const { return static_cast<int>(smaller(kLanes, channels - block * kLanes)); }
};

// The same place at another pixel, with so many taps inside the image.
Place place_at(const Conv& conv, Place at, int64_t image, int64_t y, int64_t x, int64_t taps) {
  at.pixel = (image * conv.out_height + y) * conv.out_width + x;
  if (!conv.integers)
    at.scales = conv.activation_scales + image * conv.activation_planes + at.activation_plane +
                x * conv.scale_step;
  at.positions = static_cast<int32_t>(taps * conv.channels);
  return at;
}

// A block's integers on their way out: one pixel after another, from the place's on.
template <class V, int A>
struct IntegerOutput {
  int32_t* out;
  int64_t pixel, plane;
  int32_t positions;
  int lanes;

  IntegerOutput(const Conv& conv, const Place& at, int block)
      : pixel(conv.out_channels),
        plane(conv.segments * conv.images * conv.out_height * conv.out_width * conv.out_channels),
        positions(at.positions),
        lanes(at.lanes(block)) {
    const int64_t planes = at.weight_plane * conv.activation_planes + at.activation_plane;
    out = conv.integers + planes * plane + at.segment * (plane / conv.segments) + at.pixel * pixel + at.channel +
          block * kLanes;
  }
  FOLDBIT_INLINE void write(int64_t p, const typename V::Ints (&differ)[A]) const {
    FOLDBIT_UNROLL
    for (int a = 0; a < A; ++a)
      store_some<V>(out + a * plane + p * pixel, V::matches(positions, differ[a]), lanes);
  }
};

// What floats are made with, of the blocks from a place's first on.
struct FloatOperands {
  const float *weight_scales, *bias, *slopes, *residual;  // the last three null where they are not, or not yet, due
  const float* activation_scales;                         // the first pixel's
  float* out;
  int64_t weight_scale_step;  // from a block to the next
  bool relu;

  FloatOperands(const Conv& conv, const Place& at, int planes) {
    const int64_t block = at.weight_plane * conv.groups * conv.blocks + at.first_block;
    const int64_t offset = at.pixel * conv.out_channels + at.channel;
    const bool first = at.segment == 0 && at.weight_plane == 0 && at.activation_plane == 0;
    const bool last = at.segment + 1 == conv.segments && at.weight_plane + 1 == conv.weight_planes &&
                      at.activation_plane + planes == conv.activation_planes;
    weight_scales = conv.weight_scales + (block * conv.segments + at.segment) * kLanes;
    weight_scale_step = conv.segments * kLanes;
    activation_scales = at.scales;
    out = conv.out + offset;
    bias = first ? conv.bias + at.first_block * kLanes : nullptr;
    slopes = last && conv.slopes ? conv.slopes + at.first_block * kLanes : nullptr;
    residual = last && conv.residual ? conv.residual + offset : nullptr;
    relu = last && conv.relu;
  }
};

// A block's floats. The output itself is the accumulator over segments and planes: one thread owns each pixel.
template <class V, int A>
struct FloatOutput {
  typename V::Floats weight_scale, bias, scales[A];
  const float *activation_scales, *slopes, *residual;
  float* out;
  int64_t pixel, scale_step;
  int32_t positions;
  int lanes;
  bool first, relu;

  FloatOutput(const Conv& conv, const Place& at, int b)
      : pixel(conv.out_channels), scale_step(conv.scale_step), positions(at.positions), lanes(at.lanes(b)) {
    const FloatOperands from(conv, at, A);
    weight_scale = V::load(from.weight_scales + b * from.weight_scale_step);
    activation_scales = from.activation_scales;
    for (int a = 0; a < A; ++a) scales[a] = V::mul(weight_scale, V::broadcast(activation_scales[a]));
    first = from.bias;
    if (first) bias = V::load(from.bias + b * kLanes);
    out = from.out + b * kLanes;
    slopes = from.slopes ? from.slopes + b * kLanes : nullptr;
    residual = from.residual ? from.residual + b * kLanes : nullptr;
    relu = from.relu;
  }
  FOLDBIT_INLINE void write(int64_t p, const typename V::Ints (&differ)[A]) const {
    auto sum = first ? bias : load_some<V>(out + p * pixel, lanes);
    FOLDBIT_UNROLL
    for (int a = 0; a < A; ++a) {
      const auto integer = V::to_float(V::matches(positions, differ[a]));
      const auto scale =
          scale_step ? V::mul(weight_scale, V::broadcast(activation_scales[p * scale_step + a])) : scales[a];
      sum = V::add(sum, V::mul(scale, integer));
    }
    if (relu) sum = V::at_least(sum, V::broadcast(0.0f));
    if (slopes) sum = V::leaky(sum, V::load(slopes));
    if (residual) sum = V::add(sum, load_some<V>(residual + p * pixel, lanes));
    store_some<V>(out + p * pixel, sum, lanes);
  }
};

// Block b of a row of pixels, from what differs: [pixels][A][B].
template <class V, int A, int B, class Output>
void write_block(const Output& output, int b, const typename V::Ints* differ, int64_t pixels) {
  for (int64_t p = 0; p < pixels; ++p) {
    typename V::Ints planes[A];
    FOLDBIT_UNROLL
    for (int a = 0; a < A; ++a) planes[a] = differ[(p * A + a) * B + b];
    output.write(p, planes);
  }
}

template <class V, int A, int B>
void write_integers(const Conv& conv, const Place& at, const typename V::Ints* differ, int64_t pixels) {
  for (int b = 0; b < B; ++b) write_block<V, A, B>(IntegerOutput<V, A>(conv, at, b), b, differ, pixels);
}

// B whole blocks of channels. A function of its own, so that its loop has the registers to itself.
template <class V, int A, int B, bool kResidual, bool kSlopes>
FOLDBIT_NOINLINE void write_whole_blocks(const FloatOperands& from, int64_t pixel, int32_t positions,
                                         const typename V::Ints* differ, int64_t pixels) {
  typename V::Floats scales[A * B], slopes[B];
  FOLDBIT_UNROLL
  for (int b = 0; b < B; ++b) {
    const auto weight_scale = V::load(from.weight_scales + b * from.weight_scale_step);
    FOLDBIT_UNROLL
    for (int a = 0; a < A; ++a) scales[a * B + b] = V::mul(weight_scale, V::broadcast(from.activation_scales[a]));
    if (kSlopes) slopes[b] = V::load(from.slopes + b * kLanes);
  }
  const auto low = V::broadcast(from.relu ? 0.0f : -INFINITY);  // a maximum is cheaper than to decide for each value
  const float* residual = from.residual;
  float* out = from.out;
  const float* start = from.bias ? from.bias : out;
  const int64_t start_step = from.bias ? 0 : pixel;
  for (; pixels > 0; --pixels, out += pixel, start += start_step, differ += A * B) {
    FOLDBIT_UNROLL
    for (int b = 0; b < B; ++b) {
      auto sum = V::load(start + b * kLanes);
      FOLDBIT_UNROLL
      for (int a = 0; a < A; ++a)
        sum = V::add(sum, V::mul(scales[a * B + b], V::to_float(V::matches(positions, differ[a * B + b]))));
      sum = V::at_least(sum, low);
      if (kSlopes) sum = V::leaky(sum, slopes[b]);
      if (kResidual) sum = V::add(sum, V::load(residual + b * kLanes));
      V::store(out + b * kLanes, sum);
    }
    if (kResidual) residual += pixel;
  }
}

template <class V, int A, int B>
void write_floats(const Conv& conv, const Place& at, const typename V::Ints* differ, int64_t pixels) {
  if (at.lanes(B - 1) < kLanes) {
    for (int b = 0; b < B; ++b) write_block<V, A, B>(FloatOutput<V, A>(conv, at, b), b, differ, pixels);
    return;
  }
  FloatOperands from(conv, at, A);
  auto write = from.residual ? write_whole_blocks<V, A, B, true, false> : write_whole_blocks<V, A, B, false, false>;
  if (from.slopes)
    write = from.residual ? write_whole_blocks<V, A, B, true, true> : write_whole_blocks<V, A, B, false, true>;
  if (!conv.scale_step) return write(from, conv.out_channels, at.positions, differ, pixels);
  for (; pixels > 0; --pixels, differ += A * B) {
    write(from, conv.out_channels, at.positions, differ, 1);
    from.out += conv.out_channels;
    from.activation_scales += conv.scale_step;
    if (from.residual) from.residual += conv.out_channels;
  }
}

}  // namespace
}  // namespace foldbit
