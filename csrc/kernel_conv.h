// Convolution of packed planes: broadcast one word of activations against kLanes output channels' words of
// weights, so that no sum across lanes is needed, and keep the counts of a tile of pixels in registers.
#pragma once

#include "kernel.h"

namespace foldbit {
namespace {

// Taps [begin, end) of a window along one axis that lie inside the image. The window's first tap is at
// `start`, which may be outside. Taps outside are left out: zero padding adds exactly nothing.
struct Taps {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

Taps taps_inside(int64_t start, int64_t dilation, int64_t taps, int64_t size) {
  const int64_t begin = smaller(larger(ceil_div(-start, dilation), 0), taps);
  const int64_t end = smaller(larger(ceil_div(size - start, dilation), 0), taps);
  return {begin, larger(begin, end)};
}

// Output positions [begin, end) along one axis whose windows lie inside the image entirely.
struct Interior {
  int64_t begin, end;
};

Interior interior(int64_t stride, int64_t pad, int64_t dilation, int64_t taps, int64_t size,
                  int64_t out_size) {
  const int64_t begin = smaller(ceil_div(pad, stride), out_size);
  const int64_t slack = size - 1 - (taps - 1) * dilation + pad;  // start of the last such window, plus pad
  const int64_t end = slack < 0 ? 0 : smaller(slack / stride + 1, out_size);
  return {begin, larger(begin, end)};
}

// One tile's walk: pixels in a row, all with the same taps. Strides in words.
struct Walk {
  const uint32_t* activations;  // first tap of the first pixel
  int64_t plane, pixel, tap_y, tap_x;
  const uint32_t* weights;  // first tap
  int64_t weight_block, weight_y;
  int64_t rows, columns, words;
};

// How many bits differ in a tile of P pixels, A activation planes and B blocks of output channels.
template <class V, int P, int A, int B>
struct Differences {
  static constexpr int kSize = P * A * B;
  typename V::Ints all[kSize];
  const typename V::Ints& at(int pixel, int plane, int block) const {
    return all[(pixel * A + plane) * B + block];
  }
};

template <class V, int P, int A, int B>
Differences<V, P, A, B> count_differences(const Walk& walk) {
  constexpr bool kFills = V::kRoom < INT_MAX;
  Differences<V, P, A, B> total;
  typename V::Counts counts[total.kSize];
  FOLDBIT_UNROLL
  for (int i = 0; i < total.kSize; ++i) {
    counts[i] = V::no_counts();
    total.all[i] = V::no_ints();
  }
  int64_t room = V::kRoom;
  for (int64_t y = 0; y < walk.rows; ++y) {
    for (int64_t x = 0; x < walk.columns; ++x) {
      const uint32_t* activation = walk.activations + y * walk.tap_y + x * walk.tap_x;
      const uint32_t* weight = walk.weights + y * walk.weight_y + x * walk.words * kLanes;
      for (int64_t left = walk.words, now; left > 0; left -= now) {
        now = kFills ? smaller(left, room) : left;
        for (int64_t i = 0; i < now; ++i, ++activation, weight += kLanes) {
          typename V::Words w[B];
          FOLDBIT_UNROLL
          for (int b = 0; b < B; ++b) w[b] = V::load(weight + b * walk.weight_block);
          FOLDBIT_UNROLL
          for (int pa = 0; pa < P * A; ++pa) {
            const auto a = V::broadcast(activation[pa / A * walk.pixel + pa % A * walk.plane]);
            FOLDBIT_UNROLL
            for (int b = 0; b < B; ++b) counts[pa * B + b] = V::count(counts[pa * B + b], a, w[b]);
          }
        }
        if (kFills && (room -= now) == 0) {
          room = V::kRoom;
          FOLDBIT_UNROLL
          for (int i = 0; i < total.kSize; ++i) {
            total.all[i] = V::widen(total.all[i], counts[i]);
            counts[i] = V::no_counts();
          }
        }
      }
    }
  }
  FOLDBIT_UNROLL
  for (int i = 0; i < total.kSize; ++i) total.all[i] = V::widen(total.all[i], counts[i]);
  return total;
}

// Where a tile's results go.
struct Place {
  int64_t pixel;        // index of the first output pixel, over images, rows and columns
  int64_t channel;      // first output channel
  int64_t first_block;  // index into scales and bias: group * blocks + block
  int lanes[2];         // channels in use in each block
  int weight_plane, activation_plane;
  int64_t segment;
  const float* scales;  // the first pixel's activation scales, at activation_plane
  int32_t positions;    // that were compared: taps inside the image times channels
};

template <class V, int P, int A, int B>
void write_integers(const Conv& conv, const Place& at, const Differences<V, P, A, B>& differ) {
  const int64_t pixels = conv.images * conv.out_height * conv.out_width;
  for (int p = 0; p < P; ++p)
    for (int a = 0; a < A; ++a) {
      const int64_t plane = at.weight_plane * conv.activation_planes + at.activation_plane + a;
      const int64_t row = (plane * conv.segments + at.segment) * pixels + at.pixel + p;
      for (int b = 0; b < B; ++b)
        store_some<V>(conv.integers + row * conv.out_channels + at.channel + b * kLanes,
                      V::matches(at.positions, differ.at(p, a, b)), at.lanes[b]);
    }
}

// The output itself is the accumulator over segments and planes: one thread owns each pixel.
template <class V, int P, int A, int B>
void add_floats(const Conv& conv, const Place& at, const Differences<V, P, A, B>& differ) {
  const bool first = at.segment == 0 && at.weight_plane == 0 && at.activation_plane == 0;
  const bool last = at.segment + 1 == conv.segments && at.weight_plane + 1 == conv.weight_planes &&
                    at.activation_plane + A == conv.activation_planes;
  for (int b = 0; b < B; ++b) {
    const int64_t block = at.first_block + b;
    const int64_t scales_of = at.weight_plane * conv.groups * conv.blocks + block;
    const auto weight_scale = V::load(conv.weight_scales + (scales_of * conv.segments + at.segment) * kLanes);
    const auto bias = V::load(conv.bias + block * kLanes);
    const float* scales = at.scales;
    float* out = conv.out + at.pixel * conv.out_channels + at.channel + b * kLanes;
    const float* residual = last && conv.residual ? conv.residual + (out - conv.out) : nullptr;
    const float* slopes = last && conv.slopes ? conv.slopes + block * kLanes : nullptr;
    const int64_t next_pixel = conv.out_channels, next_scales = conv.scale_step;
    const int lanes = at.lanes[b];
    FOLDBIT_UNROLL
    for (int p = 0; p < P; ++p, out += next_pixel, scales += next_scales) {
      auto sum = first ? bias : load_some<V>(out, lanes);
      FOLDBIT_UNROLL
      for (int a = 0; a < A; ++a) {
        const auto integer = V::to_float(V::matches(at.positions, differ.at(p, a, b)));
        sum = V::add(sum, V::mul(weight_scale, V::mul(V::broadcast(scales[a]), integer)));
      }
      if (slopes) sum = V::leaky(sum, V::load(slopes));
      if (residual) sum = V::add(sum, load_some<V>(residual + p * next_pixel, lanes));
      store_some<V>(out, sum, lanes);
    }
  }
}

template <class V, int P, int A, int B>
void run_tile(const Conv& conv, const Walk& walk, const Place& at) {
  const auto differ = count_differences<V, P, A, B>(walk);
  if (conv.integers)
    write_integers<V>(conv, at, differ);
  else
    add_floats<V>(conv, at, differ);
}

// The function for a tile of `pixels` pixels, 1 <= pixels <= P.
template <class V, int P, int A, int B>
auto tile_function(int64_t pixels) {
  if constexpr (P > 1) {
    if (pixels < P) return tile_function<V, P - 1, A, B>(pixels);
  }
  return &run_tile<V, P, A, B>;
}

// A piece of an output row.
struct Row {
  int64_t image, y, begin, end;
  Taps taps;          // along the height
  Interior interior;  // along the width
};

// One weight plane and A activation planes along a row: in tiles where the whole window is inside the image,
// pixel by pixel at the row's ends.
template <class V, int A, int B>
void sweep(const Conv& conv, const Row& row, Place at) {
  constexpr int kPixels = V::kAccumulators > A * B ? smaller(V::kAccumulators / (A * B), 8) : 1;
  const int64_t runs = conv.groups * conv.segments;
  const int64_t run = at.first_block / conv.blocks * conv.segments + at.segment;
  const int64_t block = at.weight_plane * conv.groups * conv.blocks + at.first_block;
  const int64_t taps = conv.kernel_h * conv.kernel_w;

  Walk walk;
  walk.plane = conv.activation_plane;
  walk.pixel = conv.stride_w * runs * conv.words;
  walk.tap_x = conv.dilation_w * runs * conv.words;
  walk.tap_y = conv.dilation_h * conv.width * runs * conv.words;
  walk.weight_y = conv.kernel_w * conv.words * kLanes;
  walk.weight_block = conv.segments * taps * conv.words * kLanes;
  walk.rows = row.taps.count();
  const int64_t y = row.y * conv.stride_h - conv.pad_top + row.taps.begin * conv.dilation_h;
  const uint32_t* activations = conv.activations + at.activation_plane * conv.activation_plane +
                                ((row.image * conv.height + y) * conv.width * runs + run) * conv.words;
  const uint32_t* weights = conv.weights + (block * conv.segments + at.segment) * taps * conv.words * kLanes +
                            row.taps.begin * walk.weight_y;

  const Interior inside = {larger(row.interior.begin, row.begin), smaller(row.interior.end, row.end)};
  const int64_t length = larger(inside.end - inside.begin, 1);
  const int64_t tile = ceil_div(length, ceil_div(length, kPixels));  // even tiles, not full ones and a small rest
  for (int64_t x = row.begin, pixels; x < row.end; x += pixels) {
    const int64_t start = x * conv.stride_w - conv.pad_left;
    Taps columns = {0, conv.kernel_w};
    if (inside.begin <= x && x < inside.end) {
      pixels = smaller(tile, inside.end - x);
    } else {
      pixels = 1;
      columns = taps_inside(start, conv.dilation_w, conv.kernel_w, conv.width);  // divides: not for every tile
    }
    walk.activations = activations + (start + columns.begin * conv.dilation_w) * runs * conv.words;
    walk.weights = weights + columns.begin * conv.words * kLanes;
    walk.columns = columns.count();
    walk.words = conv.words;
    if (walk.tap_x == walk.words) {  // neighbouring taps are neighbours in memory: one long run of words
      walk.words *= walk.columns;
      walk.columns = 1;
    }
    at.pixel = (row.image * conv.out_height + row.y) * conv.out_width + x;
    if (!conv.integers)
      at.scales = conv.activation_scales + row.image * conv.activation_planes + at.activation_plane +
                  x * conv.scale_step;
    at.positions = static_cast<int32_t>(walk.rows * columns.count() * conv.channels);
    tile_function<V, kPixels, A, B>(pixels)(conv, walk, at);
  }
}

// B blocks of output channels through every segment and plane, in the order the sum is defined in.
// Activation planes go in pairs, which share the loads of the weights.
template <class V, int B>
void all_planes(const Conv& conv, const Row& row, Place at) {
  for (at.segment = 0; at.segment < conv.segments; ++at.segment)
    for (at.weight_plane = 0; at.weight_plane < conv.weight_planes; ++at.weight_plane) {
      at.activation_plane = 0;
      if constexpr (V::kAccumulators >= 2 * B)
        for (; at.activation_plane + 1 < conv.activation_planes; at.activation_plane += 2)
          sweep<V, 2, B>(conv, row, at);
      for (; at.activation_plane < conv.activation_planes; ++at.activation_plane)
        sweep<V, 1, B>(conv, row, at);
    }
}

template <class V>
void conv_row(const Conv& conv, int64_t image, int64_t y, int64_t begin, int64_t end) {
  const Taps taps =
      taps_inside(y * conv.stride_h - conv.pad_top, conv.dilation_h, conv.kernel_h, conv.height);
  const Interior inside =
      interior(conv.stride_w, conv.pad_left, conv.dilation_w, conv.kernel_w, conv.width, conv.out_width);
  const Row row = {image, y, begin, end, taps, inside};
  const int64_t per_group = conv.out_channels / conv.groups;
  for (int64_t group = 0; group < conv.groups; ++group) {
    for (int64_t block = 0; block < conv.blocks;) {
      Place at{};
      at.first_block = group * conv.blocks + block;
      at.channel = group * per_group + block * kLanes;
      for (int b = 0; b < 2; ++b)
        at.lanes[b] = static_cast<int>(smaller(kLanes, per_group - (block + b) * kLanes));
      if (V::kBlocks == 2 && block + 1 < conv.blocks) {
        all_planes<V, V::kBlocks>(conv, row, at);
        block += 2;
      } else {
        all_planes<V, 1>(conv, row, at);
        block += 1;
      }
    }
  }
}

}  // namespace
}  // namespace foldbit
