// AVX2: convolution by looking up. AVX2 cannot count bits, but a byte shuffle looks 32 nibbles up at once. A byte
// of activations chooses one of 256 tables, of what its two nibbles differ by from each possible nibble of a
// weight; the weights' nibbles of 16 output channels are the places looked at:
//   16 channels x 8 bits = one shuffle and one addition of bytes.
// Weights are brought into that form for 64 channels and a few words at a time, and serve all pixels of a piece
// before the next words' turn; the sums wait in memory meanwhile.
#pragma once

#include <immintrin.h>

#include "kernel_conv.h"

namespace foldbit {
namespace {

struct DifferenceTables {
  alignas(32) uint8_t of[256][32];  // of a byte: what the low nibble differs by from 0..15, then the high one

  constexpr DifferenceTables() : of() {
    for (int byte = 0; byte < 256; ++byte)
      for (int i = 0; i < 32; ++i) {
        const int differ = (i < 16 ? byte & 15 : byte >> 4) ^ (i & 15);
        of[byte][i] = static_cast<uint8_t>((differ & 1) + (differ >> 1 & 1) + (differ >> 2 & 1) + (differ >> 3));
      }
  }
};

constexpr DifferenceTables kDiffer;

constexpr int kLookupWords = 15;      // at a time: a byte counts up to 4 bits for each of 4 bytes a word
constexpr int kLookupBlocks = 4;      // of channels: enough that loading a table is worth it
constexpr int kLookupPixels = 128;    // of a piece: enough that bringing weights into form is
constexpr int kFewestLookups = 8;     // pixels of a piece, below which it is not
constexpr int kLookupSteps = 4 * kLookupWords;

// Bytes of a window that lie side by side, and their place among the weights in form.
struct ByteRun {
  int64_t activation;  // from the first tap inside the image
  int weight, bytes;
};

// The runs of words [begin, end) of a window, counted over taps, that lie inside the image.
struct ByteRuns {
  ByteRun all[kLookupWords];
  int count = 0;

  void find(const Conv& conv, const Operands& from, int64_t begin, int64_t end, Taps rows, Taps columns) {
    const int64_t tap_x = conv.dilation_w * from.activation_x, tap_y = conv.dilation_h * from.activation_y;
    const int64_t row_words = conv.kernel_w * conv.words;
    const bool joined = tap_x == conv.words;  // neighbouring taps are neighbours in memory
    count = 0;
    for (int64_t y = larger(rows.begin, begin / row_words); y < rows.end && y * row_words < end; ++y)
      for (int64_t x = columns.begin; x < columns.end; x = joined ? columns.end : x + 1) {
        const int64_t start = (y * conv.kernel_w + x) * conv.words;
        const int64_t stop = start + (joined ? columns.count() : 1) * conv.words;
        const int64_t first = larger(start, begin), last = smaller(stop, end);
        if (first < last)
          all[count++] = {4 * ((y - rows.begin) * tap_y + (x - columns.begin) * tap_x + first - start),
                          static_cast<int>(4 * (first - begin)), static_cast<int>(4 * (last - first))};
      }
  }
};

// Words of 16 channels each, of B blocks, as nibbles to look up: [4 * words][B][low of 16 channels, high of them].
template <int B>
void as_nibbles(const uint32_t* weights, int64_t weight_block, int words, uint8_t* out) {
  const __m256i by_byte = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                           0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i to_low = _mm256_setr_epi64x(0, 0, 4, 4);
  for (int i = 0; i < words; ++i)
    FOLDBIT_UNROLL
    for (int b = 0; b < B; ++b) {
      const __m128i* from = reinterpret_cast<const __m128i*>(weights + b * weight_block + i * kLanes);
      const auto channels = [&](int first, int second) {  // 4 of each: bytes 0 of all, bytes 1, ...
        const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(from + first)),
                                                     _mm_loadu_si128(from + second), 1);
        return _mm256_shuffle_epi8(both, by_byte);
      };
      const __m256i even = channels(0, 2), odd = channels(1, 3);
      const __m256i bytes01 = _mm256_unpacklo_epi32(even, odd), bytes23 = _mm256_unpackhi_epi32(even, odd);
      const __m256i bytes[4] = {
          _mm256_permute4x64_epi64(bytes01, 0x88), _mm256_permute4x64_epi64(bytes01, 0xdd),
          _mm256_permute4x64_epi64(bytes23, 0x88), _mm256_permute4x64_epi64(bytes23, 0xdd)};
      FOLDBIT_UNROLL
      for (int j = 0; j < 4; ++j)
        _mm256_store_si256(reinterpret_cast<__m256i*>(out) + (4 * i + j) * B + b,
                           _mm256_and_si256(_mm256_srlv_epi64(bytes[j], to_low), _mm256_set1_epi8(15)));
    }
}

// Pixels with the same taps inside the image: the first of those, and the pixels' sums, of B * 16 channels.
struct Pixels {
  const uint8_t* activations[4];
  uint16_t* sums[4];
};

// What R pixels differ by from B blocks of channels, added to their sums, or, at first, written there.
template <int R, int B>
void look_up(const Pixels& pixels, const uint8_t* nibbles, const ByteRuns& runs, bool at_first) {
  __m256i counts[R][B];
  FOLDBIT_UNROLL
  for (int i = 0; i < R * B; ++i) counts[i / B][i % B] = _mm256_setzero_si256();
  for (int run = 0; run < runs.count; ++run) {
    const ByteRun& at = runs.all[run];
    const __m256i* weight = reinterpret_cast<const __m256i*>(nibbles) + at.weight * B;
    for (int64_t i = at.activation; i < at.activation + at.bytes; ++i, weight += B) {
      __m256i table[R];
      FOLDBIT_UNROLL
      for (int r = 0; r < R; ++r)
        table[r] = _mm256_load_si256(reinterpret_cast<const __m256i*>(kDiffer.of[pixels.activations[r][i]]));
      FOLDBIT_UNROLL
      for (int b = 0; b < B; ++b) {
        const __m256i places = _mm256_load_si256(weight + b);
        FOLDBIT_UNROLL
        for (int r = 0; r < R; ++r)
          counts[r][b] = _mm256_add_epi8(counts[r][b], _mm256_shuffle_epi8(table[r], places));
      }
    }
  }
  FOLDBIT_UNROLL
  for (int r = 0; r < R; ++r) {
    __m256i* sums = reinterpret_cast<__m256i*>(pixels.sums[r]);
    FOLDBIT_UNROLL
    for (int b = 0; b < B; ++b) {
      __m256i sum = _mm256_add_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(counts[r][b])),
                                     _mm256_cvtepu8_epi16(_mm256_extracti128_si256(counts[r][b], 1)));
      if (!at_first) sum = _mm256_add_epi16(sum, _mm256_load_si256(sums + b));
      _mm256_store_si256(sums + b, sum);
    }
  }
}

// The function for `pixels` pixels, 1 <= pixels <= R.
template <int R, int B>
auto lookup_function(int64_t pixels) {
  if constexpr (R > 1) {
    if (pixels < R) return lookup_function<R - 1, B>(pixels);
  }
  return &look_up<R, B>;
}

// Sums [A][kLookupPixels][B * 16] of a piece to its output.
template <class V, template <class, int> class Output, int A, int B>
void finish_sums(const Conv& conv, const Piece& piece, const Axes& axes, const Place& at, const uint16_t* sums) {
  for (int64_t y = piece.y_begin; y < piece.y_end; ++y)
    for (int64_t x = piece.x_begin; x < piece.x_end;) {
      const Span span = axes.x.span(x, piece.x_end);
      const int64_t taps = axes.y.span(y, y + 1).taps.count() * span.taps.count();
      const Place there = place_at(conv, at, piece.image, y, x, taps);
      for (int b = 0; b < B; ++b) {
        const Output<V, A> output(conv, there, b);
        for (int64_t p = 0; p < span.count(); ++p) {
          typename V::Ints planes[A];
          for (int a = 0; a < A; ++a)
            planes[a] = V::from_uint16(sums + ((a * kLookupPixels + p) * B + b) * kLanes);
          output.write(p, planes);
        }
      }
      sums += span.count() * B * kLanes;
      x = span.end;
    }
}

// A piece's sums, of B blocks of channels.
template <int B>
struct Sums {
  static constexpr int64_t kPixel = B * kLanes;
  uint16_t* first;
  int64_t width;
  uint16_t* at(int64_t y, int64_t x) const { return first + (y * width + x) * kPixel; }
};

// One activation plane and the words `runs` and `nibbles` stand for, for the pixels of two spans.
template <int B>
void look_up_spans(const Operands& from, int64_t plane, const Axes& axes, const Piece& piece, const Span& rows,
                   const Span& columns, const uint8_t* nibbles, const ByteRuns& runs, bool at_first,
                   const Sums<B>& sums) {
  constexpr int kPixels = B == 2 ? 4 : 3;  // so that their counts stay in registers
  Pixels pixels;
  int count = 0;
  for (int64_t y = rows.begin; y < rows.end; ++y)
    for (int64_t x = columns.begin; x < columns.end; ++x) {
      pixels.activations[count] = reinterpret_cast<const uint8_t*>(
          from.activations + plane + axes.y.tap(y, rows.taps.begin) * from.activation_y +
          axes.x.tap(x, columns.taps.begin) * from.activation_x);
      pixels.sums[count] = sums.at(y - piece.y_begin, x - piece.x_begin);
      if (++count == kPixels) {
        look_up<kPixels, B>(pixels, nibbles, runs, at_first);
        count = 0;
      }
    }
  if (count) lookup_function<kPixels - 1, B>(count)(pixels, nibbles, runs, at_first);
}

// One weight plane, A activation planes and B blocks of channels through a piece.
template <class V, int A, int B>
void look_up_planes(const Conv& conv, const Piece& piece, const Axes& axes, const Place& at) {
  constexpr int64_t kPlane = kLookupPixels * B * kLanes;  // of sums
  alignas(32) uint16_t memory[A * kPlane];
  alignas(32) uint8_t nibbles[kLookupSteps * B * 32];
  const Operands from(conv, piece.image, at);
  const Sums<B> sums = {memory, piece.x_end - piece.x_begin};

  const int64_t words = conv.kernel_h * conv.kernel_w * conv.words;
  const int64_t at_once = ceil_div(words, ceil_div(words, kLookupWords));
  ByteRuns runs;
  for (int64_t begin = 0; begin < words; begin += at_once) {
    const int64_t end = smaller(begin + at_once, words);
    as_nibbles<B>(from.weights + begin * kLanes, from.weight_block, static_cast<int>(end - begin), nibbles);
    for (Span rows = {}; rows.end < piece.y_end;) {
      rows = axes.y.span(larger(rows.end, piece.y_begin), piece.y_end);
      for (Span columns = {}; columns.end < piece.x_end;) {
        columns = axes.x.span(larger(columns.end, piece.x_begin), piece.x_end);
        runs.find(conv, from, begin, end, rows.taps, columns.taps);
        if (runs.count || begin == 0)
          for (int a = 0; a < A; ++a)
            look_up_spans(from, a * conv.activation_plane, axes, piece, rows, columns, nibbles, runs, begin == 0,
                          Sums<B>{memory + a * kPlane, sums.width});
      }
    }
  }

  if (conv.integers)
    finish_sums<V, IntegerOutput, A, B>(conv, piece, axes, at, memory);
  else
    finish_sums<V, FloatOutput, A, B>(conv, piece, axes, at, memory);
}

// A piece of at most kLookupPixels pixels.
template <class V>
void conv_by_lookup(const Conv& conv, const Piece& piece) {
  const int64_t pixels = (piece.y_end - piece.y_begin) * (piece.x_end - piece.x_begin);
  if (pixels < kFewestLookups || conv.kernel_h * conv.kernel_w * conv.channels > UINT16_MAX)
    return conv_piece<V>(conv, piece);
  const Axes axes(conv);
  for_blocks(conv, piece, kLookupBlocks, [&](int64_t blocks, const Place& first) {
    const auto planes = [&](auto b) {
      for_planes<true>(conv, first, [&](auto a, const Place& at) {
        look_up_planes<V, a.value, b.value>(conv, piece, axes, at);
      });
    };
    switch (blocks) {
      case 4: return planes(Constant<4>());
      case 3: return planes(Constant<3>());
      case 2: return planes(Constant<2>());
      default: return sweep_planes<V, 1>(conv, piece, axes, first);
    }
  });
}

}  // namespace
}  // namespace foldbit
