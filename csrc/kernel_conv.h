// Convolution of packed planes: broadcast one word of activations against kLanes output channels' words of
// weights, so that no sum across lanes is needed, and keep the counts of a tile of pixels in registers.
#pragma once

#include "kernel_output.h"

namespace foldbit {
namespace {

// Taps [begin, end) of a window along one axis that lie inside the image. The window's first tap is at
// `start`, which may be outside. Taps outside are left out: zero padding adds exactly nothing.
struct Taps {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

Taps taps_inside(int64_t start, int64_t dilation, int64_t taps, int64_t size) {
  int64_t begin = -start, end = size - start;
  if (dilation != 1) {  // divisions are dear, and this is done for every pixel at a border
    begin = ceil_div(begin, dilation);
    end = ceil_div(end, dilation);
  }
  begin = smaller(larger(begin, 0), taps);
  return {begin, larger(begin, smaller(end, taps))};
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

// The walk of tiles in a row: pixels that all have the same taps. Strides in words.
struct Walk {
  const uint32_t* activations;  // first tap of the first pixel
  int64_t plane, pixel, tap_y, tap_x;
  const uint32_t* weights;  // first tap
  int64_t weight_block, weight_y;
  int64_t rows, columns, words;
};

// How many bits differ, of P pixels a tile, A activation planes and B blocks of output channels: differ is
// [tiles][P][A][B]. A function of its own, so that its loop has the registers to itself.
template <class V, int P, int A, int B>
FOLDBIT_NOINLINE void count_tiles(const Walk& walk, int64_t tiles, typename V::Ints* differ) {
  constexpr bool kFills = V::kRoom < INT_MAX;
  constexpr int kSize = P * A * B;
  const uint32_t* tile = walk.activations;
  for (; tiles > 0; --tiles, tile += P * walk.pixel, differ += kSize) {
    typename V::Ints total[kSize];
    typename V::Counts counts[kSize];
    FOLDBIT_UNROLL
    for (int i = 0; i < kSize; ++i) {
      counts[i] = V::no_counts();
      if (kFills) total[i] = V::no_ints();
    }
    int64_t room = V::kRoom;
    const uint32_t *row = tile, *weight_row = walk.weights;
    for (int64_t y = walk.rows; y > 0; --y, row += walk.tap_y, weight_row += walk.weight_y) {
      const uint32_t *tap = row, *weight = weight_row;
      for (int64_t x = walk.columns; x > 0; --x, tap += walk.tap_x) {
        const uint32_t* activation = tap;
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
            for (int i = 0; i < kSize; ++i) {
              total[i] = V::widen(total[i], counts[i]);
              counts[i] = V::no_counts();
            }
          }
        }
      }
    }
    FOLDBIT_UNROLL
    for (int i = 0; i < kSize; ++i) differ[i] = V::widen(kFills ? total[i] : V::no_ints(), counts[i]);
  }
}

// The function for tiles of `pixels` pixels, 1 <= pixels <= P.
template <class V, int P, int A, int B>
auto tiles_function(int64_t pixels) {
  if constexpr (P > 1) {
    if (pixels < P) return tiles_function<V, P - 1, A, B>(pixels);
  }
  return &count_tiles<V, P, A, B>;
}

// Calls body(size, tiles, first pixel) for a row of pixels in tiles of at most `most`, as even as can be: first the
// larger ones.
template <class Body>
void for_tiles(int64_t pixels, int64_t most, const Body& body) {
  if (pixels <= most) return body(pixels, int64_t{1}, int64_t{0});  // no divisions for the ends of a row
  const int64_t tiles = ceil_div(pixels, most), size = pixels / tiles, one_more = pixels % tiles;
  if (one_more > 0) body(size + 1, one_more, int64_t{0});
  body(size, tiles - one_more, one_more * (size + 1));
}

// Where the operands of one weight plane, from one activation plane on, begin. Strides in words.
struct Operands {
  const uint32_t* activations;  // of the image
  const uint32_t* weights;      // of the first block
  int64_t activation_y, activation_x, weight_tap, weight_block;

  Operands(const Conv& conv, int64_t image, const Place& at) {
    const int64_t runs = conv.groups * conv.segments;
    const int64_t run = at.first_block / conv.blocks * conv.segments + at.segment;
    const int64_t block = at.weight_plane * conv.groups * conv.blocks + at.first_block;
    activation_x = runs * conv.words;
    activation_y = conv.width * activation_x;
    activations = conv.activations + at.activation_plane * conv.activation_plane +
                  image * conv.height * activation_y + run * conv.words;
    weight_tap = conv.words * kLanes;
    weight_block = conv.segments * conv.kernel_h * conv.kernel_w * weight_tap;
    weights = conv.weights + block * weight_block + at.segment * weight_block / conv.segments;
  }
};

// Positions [begin, end) along one axis of the output that have the same taps inside the image.
struct Span {
  int64_t begin, end;
  Taps taps;
  int64_t count() const { return end - begin; }
};

// One axis of a convolution, and the output positions along it whose windows lie inside the image.
struct Axis {
  int64_t stride, pad, dilation, taps, size;
  Interior inside;

  Axis(int64_t stride, int64_t pad, int64_t dilation, int64_t taps, int64_t size, int64_t out_size)
      : stride(stride), pad(pad), dilation(dilation), taps(taps), size(size),
        inside(interior(stride, pad, dilation, taps, size, out_size)) {}

  // Where in the input a tap of an output position's window lies; before 0 it is outside.
  int64_t tap(int64_t position, int64_t tap) const { return position * stride - pad + tap * dilation; }
  // The span that begins at a position: of all that lie inside, or of one.
  Span span(int64_t begin, int64_t end) const {
    if (inside.begin <= begin && begin < inside.end) return {begin, smaller(end, inside.end), {0, taps}};
    return {begin, begin + 1, taps_inside(tap(begin, 0), dilation, taps, size)};
  }
};

struct Axes {
  Axis y, x;
  explicit Axes(const Conv& conv)
      : y(conv.stride_h, conv.pad_top, conv.dilation_h, conv.kernel_h, conv.height, conv.out_height),
        x(conv.stride_w, conv.pad_left, conv.dilation_w, conv.kernel_w, conv.width, conv.out_width) {}
};

// Calls body(y, rows, columns) for every output row of a piece, in spans of at most kRowPixels pixels.
template <class Body>
void for_spans(const Axes& axes, const Piece& piece, const Body& body) {
  for (int64_t y = piece.y_begin; y < piece.y_end; ++y) {
    const Taps rows = axes.y.span(y, y + 1).taps;
    for (int64_t x = piece.x_begin; x < piece.x_end;) {
      const Span columns = axes.x.span(x, smaller(x + kRowPixels, piece.x_end));
      body(y, rows, columns);
      x = columns.end;
    }
  }
}

// One weight plane and A activation planes through a piece.
template <class V, int A, int B>
void sweep(const Conv& conv, const Piece& piece, const Axes& axes, const Place& at) {
  constexpr int kPixels = V::kAccumulators > A * B ? smaller(V::kAccumulators / (A * B), 8) : 1;
  const Operands from(conv, piece.image, at);
  Walk walk;
  walk.plane = conv.activation_plane;
  walk.pixel = conv.stride_w * from.activation_x;
  walk.tap_x = conv.dilation_w * from.activation_x;
  walk.tap_y = conv.dilation_h * from.activation_y;
  walk.weight_y = conv.kernel_w * from.weight_tap;
  walk.weight_block = from.weight_block;
  const bool joined = walk.tap_x == conv.words;  // neighbouring taps are neighbours in memory: one long run of words
  typename V::Ints differ[kRowPixels * A * B];
  for_spans(axes, piece, [&](int64_t y, Taps rows, const Span& columns) {
    const int64_t taps = columns.taps.count();
    walk.activations = from.activations + axes.y.tap(y, rows.begin) * from.activation_y +
                       axes.x.tap(columns.begin, columns.taps.begin) * from.activation_x;
    walk.weights = from.weights + rows.begin * walk.weight_y + columns.taps.begin * from.weight_tap;
    walk.rows = rows.count();
    walk.columns = joined ? 1 : taps;
    walk.words = joined ? taps * conv.words : conv.words;
    for_tiles(columns.count(), kPixels, [&](int64_t size, int64_t tiles, int64_t first) {
      tiles_function<V, kPixels, A, B>(size)(walk, tiles, differ + first * A * B);
      walk.activations += tiles * size * walk.pixel;
    });
    const Place there = place_at(conv, at, piece.image, y, columns.begin, rows.count() * taps);
    if (conv.integers)
      write_integers<V, A, B>(conv, there, differ, columns.count());
    else
      write_floats<V, A, B>(conv, there, differ, columns.count());
  });
}

// Calls body(A, place) for every segment, weight plane and one or two (A) activation planes, in the order the sum
// is defined in. Two activation planes share the loads of the weights.
template <bool kPairs, class Body>
void for_planes(const Conv& conv, Place at, const Body& body) {
  for (at.segment = 0; at.segment < conv.segments; ++at.segment)
    for (at.weight_plane = 0; at.weight_plane < conv.weight_planes; ++at.weight_plane) {
      at.activation_plane = 0;
      if constexpr (kPairs)
        for (; at.activation_plane + 1 < conv.activation_planes; at.activation_plane += 2)
          body(Constant<2>(), at);
      for (; at.activation_plane < conv.activation_planes; ++at.activation_plane) body(Constant<1>(), at);
    }
}

// Calls body(blocks, place) for the piece's blocks of output channels, several at a time: most at once, and never
// of two groups.
template <class Body>
void for_blocks(const Conv& conv, const Piece& piece, int64_t most, const Body& body) {
  const int64_t per_group = conv.out_channels / conv.groups;
  for (int64_t block = piece.block_begin, blocks; block < piece.block_end; block += blocks) {
    const int64_t group = block / conv.blocks, in_group = block % conv.blocks;
    blocks = smaller(smaller(most, conv.blocks - in_group), piece.block_end - block);
    Place at{};
    at.first_block = block;
    at.channel = group * per_group + in_group * kLanes;
    at.channels = per_group - in_group * kLanes;
    body(blocks, at);
  }
}

template <class V, int B>
void sweep_planes(const Conv& conv, const Piece& piece, const Axes& axes, const Place& first) {
  for_planes<(V::kAccumulators >= 2 * B)>(conv, first, [&](auto a, const Place& at) {
    sweep<V, a.value, B>(conv, piece, axes, at);
  });
}

template <class V>
void conv_piece(const Conv& conv, const Piece& piece) {
  const Axes axes(conv);
  for_blocks(conv, piece, V::kBlocks, [&](int64_t blocks, const Place& at) {
    if (blocks == V::kBlocks)
      sweep_planes<V, V::kBlocks>(conv, piece, axes, at);
    else
      sweep_planes<V, 1>(conv, piece, axes, at);
  });
}

}  // namespace
}  // namespace foldbit
