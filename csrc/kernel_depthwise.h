// Depthwise convolution, of one input and one output channel a group. A word is 32 channels of a pixel; no two of
// its bits belong to one sum, so instead of counting a word's bits each channel counts its own: two blocks of output
// channels a word.
#pragma once

#include "kernel_conv.h"

namespace foldbit {
namespace {

constexpr int64_t kWordBlocks = kWordBits / kLanes;

// How many bits differ, of P pixels in a row, A activation planes and one word of channels, in B blocks: differ is
// [P][A][B]. A tap of the weights is walk.words words.
template <class V, int P, int A, int B>
void depthwise_tile(const Walk& walk, typename V::Ints* differ) {
  typename V::Marks marks[P][A];
  FOLDBIT_UNROLL
  for (int i = 0; i < P * A; ++i) marks[i / A][i % A] = V::no_marks();
  for (int64_t y = 0; y < walk.rows; ++y)
    for (int64_t x = 0; x < walk.columns; ++x) {
      const uint32_t* activation = walk.activations + y * walk.tap_y + x * walk.tap_x;
      const uint32_t weight = walk.weights[y * walk.weight_y + x * walk.words];
      FOLDBIT_UNROLL
      for (int i = 0; i < P * A; ++i) {
        const uint32_t a = activation[i / A * walk.pixel + i % A * walk.plane];
        marks[i / A][i % A] = V::count_marks(marks[i / A][i % A], a, weight);
      }
    }
  FOLDBIT_UNROLL
  for (int i = 0; i < P * A; ++i) {
    differ[i * B] = V::marks_of(marks[i / A][i % A], 0);
    if (B > 1) differ[i * B + 1] = V::marks_of(marks[i / A][i % A], 1);
  }
}

// The function for a tile of `pixels` pixels, 1 <= pixels <= P.
template <class V, int P, int A, int B>
auto depthwise_function(int64_t pixels) {
  if constexpr (P > 1) {
    if (pixels < P) return depthwise_function<V, P - 1, A, B>(pixels);
  }
  return &depthwise_tile<V, P, A, B>;
}

// One weight plane, A activation planes and one word of channels, that is B blocks, through a piece.
template <class V, int A, int B>
void sweep_depthwise(const Conv& conv, const Piece& piece, const Axes& axes, const Place& at) {
  const int64_t word = at.first_block / kWordBlocks, row = conv.width * conv.words;
  const uint32_t* activations = conv.activations + at.activation_plane * conv.activation_plane +
                                piece.image * conv.height * row + word;
  const uint32_t* weights = conv.weights + at.weight_plane * conv.kernel_h * conv.kernel_w * conv.words + word;
  Walk walk{};
  walk.plane = conv.activation_plane;
  walk.pixel = conv.stride_w * conv.words;
  walk.tap_x = conv.dilation_w * conv.words;
  walk.tap_y = conv.dilation_h * row;
  walk.weight_y = conv.kernel_w * conv.words;
  walk.words = conv.words;
  typename V::Ints differ[kRowPixels * A * B];
  for_spans(axes, piece, [&](int64_t y, Taps rows, const Span& columns) {
    const int64_t taps = columns.taps.count();
    walk.activations =
        activations + axes.y.tap(y, rows.begin) * row + axes.x.tap(columns.begin, columns.taps.begin) * conv.words;
    walk.weights = weights + rows.begin * walk.weight_y + columns.taps.begin * walk.words;
    walk.rows = rows.count();
    walk.columns = taps;
    constexpr int64_t kPixels = V::kMarks / A;
    for_tiles(columns.count(), kPixels, [&](int64_t size, int64_t tiles, int64_t first) {
      for (int64_t tile = 0; tile < tiles; ++tile, walk.activations += size * walk.pixel)
        depthwise_function<V, kPixels, A, B>(size)(walk, differ + (first + tile * size) * A * B);
    });
    const Place there = place_at(conv, at, piece.image, y, columns.begin, rows.count() * taps);
    write_floats<V, A, B>(conv, there, differ, columns.count());
  });
}

template <class V>
void depthwise_piece(const Conv& conv, const Piece& piece) {
  const Axes axes(conv);
  for_blocks(conv, piece, kWordBlocks, [&](int64_t blocks, const Place& first) {
    for_planes<(V::kMarks >= 2)>(conv, first, [&](auto a, const Place& at) {
      if (blocks > 1)
        sweep_depthwise<V, a.value, 2>(conv, piece, axes, at);
      else
        sweep_depthwise<V, a.value, 1>(conv, piece, axes, at);
    });
  });
}

}  // namespace
}  // namespace foldbit
