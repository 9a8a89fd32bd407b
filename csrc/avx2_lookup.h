// AVX2: convolution by looking up pairs of activations (avx2_pairs.h): two planes of a pixel, or one plane of two.
// Weights are brought into the form that is looked up for up to 128 channels and some words at a time, and serve all
// pixels of a piece before the next words' turn; the sums wait in memory meanwhile.
#pragma once

#include "avx2_pairs.h"
#include "avx2_sums.h"
#include "kernel_conv.h"

namespace foldbit {
namespace {

constexpr int kLookupWords = 84;    // of 32 channels, at a time: their nibbles fit the nearest cache
constexpr int kLookupPixels = 128;  // of a piece: enough that bringing weights into form is
constexpr int kFewestLookups = 8;   // activations of a piece, below which it is not
constexpr int kPlaceWords = 2048;   // of a piece's input, up to which tables are found before its windows need them

// Words of a window that lie side by side: from the first tap inside the image, and from the first word of those
// looked up at a time.
struct WordRun {
  int64_t activation;
  int word, words;
};

// Nibbles of those looked up at a time.
struct Stretch {
  int begin, end;
};

// The runs of words [begin, end) of a window, counted over taps, that lie inside the image.
struct WordRuns {
  WordRun all[kLookupWords];
  Stretch stretches[kLookupWords];  // of one run or more that lie side by side among the weights
  int count = 0, stretch_count = 0;
  bool whole_steps;  // in every run but one that the words looked up at a time end with

  void find(const Conv& conv, const Operands& from, int64_t begin, int64_t end, Taps rows, Taps columns) {
    const int64_t tap_x = conv.dilation_w * from.activation_x, tap_y = conv.dilation_h * from.activation_y;
    const int64_t row_words = conv.kernel_w * conv.words;
    const bool joined = tap_x == conv.words;  // neighbouring taps are neighbours in memory
    count = stretch_count = 0;
    whole_steps = true;
    for (int64_t y = larger(rows.begin, begin / row_words); y < rows.end && y * row_words < end; ++y)
      for (int64_t x = columns.begin; x < columns.end; x = joined ? columns.end : x + 1) {
        const int64_t start = (y * conv.kernel_w + x) * conv.words;
        const int64_t stop = start + (joined ? columns.count() : 1) * conv.words;
        const int64_t first = larger(start, begin), last = smaller(stop, end);
        if (first < last)
          add({(y - rows.begin) * tap_y + (x - columns.begin) * tap_x + first - start,
               static_cast<int>(first - begin), static_cast<int>(last - first)},
              last == end);
      }
  }

 private:
  void add(const WordRun& run, bool at_end) {
    const int begin = run.word * kNibbles, end = begin + run.words * kNibbles;
    all[count++] = run;
    whole_steps = whole_steps && (at_end || run.words % kStep == 0);
    if (stretch_count && stretches[stretch_count - 1].end == begin)
      stretches[stretch_count - 1].end = end;
    else
      stretches[stretch_count++] = {begin, end};
  }
};

// A plane of a pixel: its first tap inside the image, its sums, and its index in the output, over rows and columns.
struct Pixel {
  const uint32_t* activations;
  uint16_t* sums;
  int64_t index;
};
constexpr int64_t kNowhere = -1;

// A piece's sums, of two activation planes or one, and the words looked up at a time.
template <int A, int V>
struct Lookup {
  static constexpr int64_t kPixel = V * 2 * kLanes;
  static constexpr int64_t kPlane = kLookupPixels * kPixel;
  static constexpr int kWords = kLookupWords / V / kStep * kStep;
  static constexpr int kLookups = kWords * kNibbles + kStep - 1;
  alignas(32) uint16_t sums[A * kPlane];
  alignas(32) uint16_t spare[kPixel];
  alignas(32) uint8_t nibbles[kLookups * V * 32];
  uint16_t tables[kLookups];
  alignas(32) uint16_t places[A == 2 ? kPlaceWords * kNibbles + kStep - 1 : 1];  // of all windows, from `found` on
  const uint32_t* found = nullptr;
  WordRuns runs;
  bool at_first;

  // Two planes' tables, most of which neighbouring windows need, too. Where a row of taps is whole steps, or is all.
  void find_places(const Conv& conv, const Operands& from, const Axes& axes, const Piece& piece) {
    const bool joined = conv.kernel_w == 1 || conv.dilation_w * from.activation_x == conv.words;
    const int64_t run = joined ? conv.kernel_w * conv.words : conv.words;
    if (run % kStep && (!joined || conv.kernel_h > 1)) return;
    const auto word = [&](int64_t y, int64_t x) { return y * from.activation_y + x * from.activation_x; };
    const auto first = [](const Axis& axis, int64_t begin) { return larger(axis.tap(begin, 0), 0); };
    const auto last = [](const Axis& axis, int64_t end) {
      return smaller(axis.tap(end - 1, axis.taps - 1), axis.size - 1);
    };
    const int64_t begin = word(first(axes.y, piece.y_begin), first(axes.x, piece.x_begin));
    const int64_t words = word(last(axes.y, piece.y_end), last(axes.x, piece.x_end)) + conv.words - begin;
    if (words <= 0 || words > kPlaceWords) return;
    found = from.activations + begin;
    find_tables(found, found + conv.activation_plane, static_cast<int>(words), places);
    for (int rest = 0; rest < kStep - 1; ++rest) places[words * kNibbles + rest] = kNoPair;
  }

  // Two activations whose taps lie inside the image alike, and out with the sums.
  template <class Output>
  void pair(const Pixel& first, const Pixel& second, Output& output) {
    bool written = !at_first;
    const auto add = [&](const uint16_t* from, int begin, int end) {
      for (int at = begin, count; at < end; at += count, from += count) {
        count = static_cast<int>(smaller(end - at, kMostNibbles));
        const __m256i* weights = reinterpret_cast<const __m256i*>(nibbles) + at * V;
        if (written)
          look_up<V, false>(from, weights, count, first.sums, second.sums);
        else
          look_up<V, true>(from, weights, count, first.sums, second.sums);
        written = true;
      }
    };
    if (found && runs.whole_steps) {
      for (int i = 0; i < runs.count; ++i) {
        const WordRun& run = runs.all[i];
        add(places + (first.activations - found + run.activation) * kNibbles, run.word * kNibbles,
            (run.word + run.words) * kNibbles);
      }
    } else {
      for (int i = 0; i < runs.count; ++i) {
        const WordRun& run = runs.all[i];
        find_tables(first.activations + run.activation, second.activations + run.activation, run.words,
                    tables + run.word * kNibbles);
      }
      for (int i = 0; i < runs.stretch_count; ++i) {
        const Stretch& stretch = runs.stretches[i];
        for (int rest = 0; rest < kStep - 1; ++rest) tables[stretch.end + rest] = kNoPair;
        add(tables + stretch.begin, stretch.begin, stretch.end);
      }
    }
    if (!written) look_up<V, true>(tables, nullptr, 0, first.sums, second.sums);
    output.write(first.index, {first.sums, kPlane});
    if (A == 1 && second.index != kNowhere) output.write(second.index, {second.sums, kPlane});
  }

  // All pixels of two spans.
  template <class Output>
  void spans(const Conv& conv, const Operands& from, const Axes& axes, const Piece& piece, const Span& rows,
             const Span& columns, Output& output) {
    const int64_t width = piece.x_end - piece.x_begin, step = conv.stride_w * from.activation_x;
    Pixel waiting = {nullptr, nullptr, kNowhere};
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      Pixel pixel = {from.activations + axes.y.tap(y, rows.taps.begin) * from.activation_y +
                         axes.x.tap(columns.begin, columns.taps.begin) * from.activation_x,
                     sums + ((y - piece.y_begin) * width + columns.begin - piece.x_begin) * kPixel,
                     y * conv.out_width + columns.begin};
      for (int64_t x = columns.begin; x < columns.end;
           ++x, pixel.activations += step, pixel.sums += kPixel, ++pixel.index) {
        if constexpr (A == 2) {
          pair(pixel, {pixel.activations + conv.activation_plane, pixel.sums + kPlane, kNowhere}, output);
        } else if (waiting.sums) {
          pair(waiting, pixel, output);
          waiting.sums = nullptr;
        } else {
          waiting = pixel;
        }
      }
    }
    if (waiting.sums) pair(waiting, {waiting.activations, spare, kNowhere}, output);
  }
};

// One weight plane, A activation planes and some blocks of channels, at most 2 * V, through a piece.
template <class P, int A, int V>
void look_up_planes(const Conv& conv, const Piece& piece, const Axes& axes, const Place& at, int64_t blocks) {
  Lookup<A, V> lookup;
  const Operands from(conv, piece.image, at);
  const int64_t words = conv.kernel_h * conv.kernel_w * conv.words;
  const int64_t at_once = ceil_div(ceil_div(words, ceil_div(words, lookup.kWords)), kStep) * kStep;
  if (A == 2) lookup.find_places(conv, from, axes, piece);
  for (int64_t begin = 0; begin < words; begin += at_once) {
    const int64_t end = smaller(begin + at_once, words);
    lookup.at_first = begin == 0;
    as_nibbles<V>(from.weights + begin * kLanes, from.weight_block, blocks, static_cast<int>(end - begin),
                  lookup.nibbles);
    for (Span rows = {}; rows.end < piece.y_end;) {
      rows = axes.y.span(larger(rows.end, piece.y_begin), piece.y_end);
      for (Span columns = {}; columns.end < piece.x_end;) {
        columns = axes.x.span(larger(columns.end, piece.x_begin), piece.x_end);
        lookup.runs.find(conv, from, begin, end, rows.taps, columns.taps);
        const auto spans = [&](auto&& output) { lookup.spans(conv, from, axes, piece, rows, columns, output); };
        const Place there = place_at(conv, at, piece.image, 0, 0, rows.taps.count() * columns.taps.count());
        if (end == words && conv.integers)
          spans(PixelOutput<IntegerPixels, P, A>(conv, there, blocks));
        else if (end == words)
          spans(PixelOutput<FloatPixels, P, A>(conv, there, blocks));
        else if (lookup.runs.count || lookup.at_first)
          spans(NoPixels());
      }
    }
  }
}

// A piece of at most kLookupPixels pixels.
template <class P>
void conv_by_lookup(const Conv& conv, const Piece& piece) {
  const int64_t pixels = (piece.y_end - piece.y_begin) * (piece.x_end - piece.x_begin);
  if (pixels * conv.activation_planes < kFewestLookups || conv.kernel_h * conv.kernel_w * conv.channels > UINT16_MAX)
    return conv_piece<P>(conv, piece);
  const Axes axes(conv);
  for_blocks(conv, piece, kLookupBlocks, [&](int64_t blocks, const Place& first) {
    const auto planes = [&](auto v) {
      for_planes<true>(conv, first, [&](auto a, const Place& at) {
        look_up_planes<P, a.value, v.value>(conv, piece, axes, at, blocks);
      });
    };
    if (blocks == 1) return sweep_planes<P, 1>(conv, piece, axes, first);
    switch (ceil_div(blocks, 2)) {
      case 4: return planes(Constant<4>());
      case 3: return planes(Constant<3>());
      case 2: return planes(Constant<2>());
      default: return planes(Constant<1>());
    }
  });
}

}  // namespace
}  // namespace foldbit
