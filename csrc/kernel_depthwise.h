// Depthwise convolution, of one input and one output channel a group. A word is 32 channels of a pixel; no two of
// its bits belong to one sum, so instead of counting a word's bits each channel counts its own: two blocks of output
// channels a word.
#pragma once

#include "kernel_conv.h"

namespace foldbit {
namespace {

constexpr int64_t kWordBlocks = kWordBits / kLanes;

// P pixels in a row, A activation planes and one word of channels; a tap of the weights is walk.words words.
template <class V, int P, int A>
void depthwise_tile(const Walk& walk, const FloatOutput<V, A> (&outputs)[2], int64_t blocks) {
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
  const auto write = [&](int p, auto b) {
    typename V::Ints differ[A];
    FOLDBIT_UNROLL
    for (int a = 0; a < A; ++a) differ[a] = V::marks_of(marks[p][a], b.value);
    outputs[b.value].write(p, differ);
  };
  FOLDBIT_UNROLL
  for (int p = 0; p < P; ++p) {
    write(p, Constant<0>());
    if (blocks > 1) write(p, Constant<1>());
  }
}

// The function for a tile of `pixels` pixels, 1 <= pixels <= P.
template <class V, int P, int A>
auto depthwise_function(int64_t pixels) {
  if constexpr (P > 1) {
    if (pixels < P) return depthwise_function<V, P - 1, A>(pixels);
  }
  return &depthwise_tile<V, P, A>;
}

// One weight plane, A activation planes and one word of channels, that is one or two blocks, through a piece.
template <class V, int A>
void sweep_depthwise(const Conv& conv, const Piece& piece, const Axes& axes, const Place& at, int64_t blocks) {
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
  for (int64_t y = piece.y_begin; y < piece.y_end; ++y) {
    const Taps rows = axes.y.span(y, y + 1).taps;
    walk.rows = rows.count();
    for_tiles(axes.x, piece, V::kMarks / A, [&](int64_t x, int64_t pixels, Taps columns) {
      walk.columns = columns.count();
      walk.activations = activations + axes.y.tap(y, rows.begin) * row + axes.x.tap(x, columns.begin) * conv.words;
      walk.weights = weights + rows.begin * walk.weight_y + columns.begin * walk.words;
      const Place there = place_at(conv, at, piece.image, y, x, rows.count() * columns.count());
      const FloatOutput<V, A> outputs[] = {{conv, there, 0}, {conv, there, static_cast<int>(blocks) - 1}};
      depthwise_function<V, V::kMarks / A, A>(pixels)(walk, outputs, blocks);
    });
  }
}

template <class V>
void depthwise_piece(const Conv& conv, const Piece& piece) {
  const Axes axes(conv);
  for_blocks(conv, piece, kWordBlocks, [&](int64_t blocks, const Place& first) {
    for_planes<(V::kMarks >= 2)>(conv, first, [&](auto a, const Place& at) {
      sweep_depthwise<V, a.value>(conv, piece, axes, at, blocks);
    });
  });
}

}  // namespace
}  // namespace foldbit
