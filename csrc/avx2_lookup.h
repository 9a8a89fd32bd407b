// AVX2: convolution by looking up. AVX2 cannot count bits, but a byte shuffle looks 32 nibbles up at once. A nibble
// of one activation word and one of another choose a table, of what each differs by from every possible nibble of a
// weight, in the two halves of a byte. The weights' nibbles of 32 output channels are the places looked at:
//   32 channels x 4 bits x 2 activations = one shuffle, and one and two thirds additions or shifts (Pair).
// The two are two planes of a pixel, or one plane of two pixels.
// Weights are brought into that form for 128 channels and a few words at a time, and serve all pixels of a piece
// before the next words' turn; the sums wait in memory meanwhile.
#pragma once

#include <immintrin.h>

#include "kernel_conv.h"

// sum += bytes, where the sum is. Left to itself GCC adds elsewhere and copies the sum back at every turn of a loop.
#if defined(__GNUC__)
#define FOLDBIT_ADD_BYTES(sum, bytes) __asm__("vpaddb %1, %0, %0" : "+x"(sum) : "x"(bytes))
#else
#define FOLDBIT_ADD_BYTES(sum, bytes) sum = _mm256_add_epi8(sum, bytes)
#endif

namespace foldbit {
namespace {

constexpr int kLookupWords = 84;    // of 32 channels, at a time: their nibbles fit the nearest cache
constexpr int kLookupBlocks = 8;    // of channels: enough that loading a table is worth it
constexpr int kLookupPixels = 128;  // of a piece: enough that bringing weights into form is
constexpr int kFewestLookups = 8;   // activations of a piece, below which it is not
constexpr int kNibbles = 8;         // of a word
constexpr int kStep = 3;            // nibbles whose differences fit half a byte
constexpr int kMostNibbles = 63;    // whose differences fit a byte

struct PairTables {
  alignas(64) uint8_t of[257][16];  // of two nibbles: what each differs by from 0..15; then of none at all

  constexpr PairTables() : of() {
    for (int pair = 0; pair < 256; ++pair)
      for (int i = 0; i < 16; ++i)
        of[pair][i] = static_cast<uint8_t>(bits((pair & 15) ^ i) + 16 * bits((pair >> 4) ^ i));
  }
  static constexpr int bits(int nibble) {
    return (nibble & 1) + (nibble >> 1 & 1) + (nibble >> 2 & 1) + (nibble >> 3);
  }
};

constexpr PairTables kDiffer;
constexpr int kPlace = 2;  // a table's, in 8 bytes, which is as far as an address can multiply
constexpr uint16_t kNoPair = 256 * kPlace;

// Words of a window that lie side by side: from the first tap inside the image, and from the first word of those
// looked up at a time.
struct WordRun {
  int64_t activation;
  int word, words;
};

// Nibbles of those looked up at a time.
struct Stretch {
  int begin, count;
};

// The runs of words [begin, end) of a window, counted over taps, that lie inside the image.
struct WordRuns {
  WordRun all[kLookupWords];
  Stretch stretches[kLookupWords];  // of one run or more that lie side by side among the weights
  int count = 0, stretch_count = 0;

  void find(const Conv& conv, const Operands& from, int64_t begin, int64_t end, Taps rows, Taps columns) {
    const int64_t tap_x = conv.dilation_w * from.activation_x, tap_y = conv.dilation_h * from.activation_y;
    const int64_t row_words = conv.kernel_w * conv.words;
    const bool joined = tap_x == conv.words;  // neighbouring taps are neighbours in memory
    count = stretch_count = 0;
    for (int64_t y = larger(rows.begin, begin / row_words); y < rows.end && y * row_words < end; ++y)
      for (int64_t x = columns.begin; x < columns.end; x = joined ? columns.end : x + 1) {
        const int64_t start = (y * conv.kernel_w + x) * conv.words;
        const int64_t stop = start + (joined ? columns.count() : 1) * conv.words;
        const int64_t first = larger(start, begin), last = smaller(stop, end);
        if (first < last)
          add({(y - rows.begin) * tap_y + (x - columns.begin) * tap_x + first - start,
               static_cast<int>(first - begin), static_cast<int>(last - first)});
      }
  }

 private:
  void add(const WordRun& run) {
    const int begin = run.word * kNibbles, size = run.words * kNibbles;
    all[count++] = run;
    if (stretch_count && stretches[stretch_count - 1].begin + stretches[stretch_count - 1].count == begin)
      stretches[stretch_count - 1].count += size;
    else
      stretches[stretch_count++] = {begin, size};
  }
};

// Words of blocks of 16 channels, as nibbles to look up: [nibbles][V][two blocks' channels in turn].
template <int V>
void as_nibbles(const uint32_t* weights, int64_t weight_block, int64_t blocks, int words, uint8_t* out) {
  const __m256i by_byte = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                           0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto store = [&](__m256i bytes, int nibble, int v) {
    __m256i* to = reinterpret_cast<__m256i*>(out) + nibble * V + v;
    _mm256_store_si256(to, _mm256_and_si256(bytes, _mm256_set1_epi8(15)));
    _mm256_store_si256(to + V, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15)));
  };
  for (int i = 0; i < words; ++i)
    FOLDBIT_UNROLL
    for (int v = 0; v < V; ++v) {
      __m256i bytes01[2], bytes23[2];  // of each block, eight channels' and the other eight's
      FOLDBIT_UNROLL
      for (int b = 0; b < 2; ++b) {  // an odd block out stands beside itself
        const __m128i* from =
            reinterpret_cast<const __m128i*>(weights + smaller(2 * v + b, blocks - 1) * weight_block + i * kLanes);
        const auto channels = [&](int first, int second) {  // 4 of each: bytes 0 of all, bytes 1, ...
          const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(from + first)),
                                                       _mm_loadu_si128(from + second), 1);
          return _mm256_shuffle_epi8(both, by_byte);
        };
        const __m256i even = channels(0, 2), odd = channels(1, 3);
        bytes01[b] = _mm256_unpacklo_epi32(even, odd);
        bytes23[b] = _mm256_unpackhi_epi32(even, odd);
      }
      store(_mm256_unpacklo_epi8(bytes01[0], bytes01[1]), kNibbles * i, v);
      store(_mm256_unpackhi_epi8(bytes01[0], bytes01[1]), kNibbles * i + 2, v);
      store(_mm256_unpacklo_epi8(bytes23[0], bytes23[1]), kNibbles * i + 4, v);
      store(_mm256_unpackhi_epi8(bytes23[0], bytes23[1]), kNibbles * i + 6, v);
    }
}

// The places of tables, of 16 bits each: of the low nibbles of bytes of two words in turn, and of the high ones.
struct TablePlaces {
  __m256i low, high;

  explicit TablePlaces(__m256i bytes) {
    const __m256i nibble = _mm256_set1_epi8(15), place = _mm256_set1_epi16(kPlace | 16 * kPlace << 8);
    low = _mm256_maddubs_epi16(_mm256_and_si256(bytes, nibble), place);
    high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), place);
  }
  __m256i first() const { return _mm256_unpacklo_epi16(low, high); }  // of each half's first eight bytes
  __m256i second() const { return _mm256_unpackhi_epi16(low, high); }
};

// The places of the tables of all nibbles of two pixels, or of two planes of one.
void find_tables(const uint32_t* first, const uint32_t* second, const WordRuns& runs, uint16_t* out) {
  for (int run = 0; run < runs.count; ++run) {
    const WordRun& at = runs.all[run];
    const __m128i* a = reinterpret_cast<const __m128i*>(first + at.activation);
    const __m128i* b = reinterpret_cast<const __m128i*>(second + at.activation);
    __m128i* to = reinterpret_cast<__m128i*>(out + at.word * kNibbles);
    int left = at.words;
    const auto two_words = [&](__m128i first_words, __m128i second_words) {
      return TablePlaces(_mm256_castsi128_si256(_mm_unpacklo_epi8(first_words, second_words)));
    };
    for (; left >= 4; left -= 4, to += 4) {
      const TablePlaces places(
          _mm256_or_si256(_mm256_cvtepu8_epi16(_mm_loadu_si128(a++)),
                          _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(b++)), 8)));
      _mm_storeu_si128(to, _mm256_castsi256_si128(places.first()));
      _mm_storeu_si128(to + 1, _mm256_castsi256_si128(places.second()));
      _mm_storeu_si128(to + 2, _mm256_extracti128_si256(places.first(), 1));
      _mm_storeu_si128(to + 3, _mm256_extracti128_si256(places.second(), 1));
    }
    if (left & 2) {
      const TablePlaces places = two_words(_mm_loadl_epi64(a), _mm_loadl_epi64(b));
      _mm_storeu_si128(to++, _mm256_castsi256_si128(places.first()));
      _mm_storeu_si128(to++, _mm256_castsi256_si128(places.second()));
    }
    if (left & 1) {
      const int64_t last = at.activation + at.words - 1;
      const TablePlaces places = two_words(_mm_cvtsi32_si128(static_cast<int>(first[last])),
                                           _mm_cvtsi32_si128(static_cast<int>(second[last])));
      _mm_storeu_si128(to, _mm256_castsi256_si128(places.first()));
    }
  }
  for (int i = 0; i < runs.stretch_count; ++i) {
    const Stretch& stretch = runs.stretches[i];
    for (int rest = 0; rest < kStep - 1; ++rest) out[stretch.begin + stretch.count + rest] = kNoPair;
  }
}

// What two activations differ by from V * 32 channels, in bytes.
// A byte t of a table is first + 16 * second, and so is the sum of kStep of them, for neither is more than 4. Over many
// steps are kept, modulo 256 each byte,
//   all = sum of t,  upper = sum of t / 16, taken of two bytes at a time:
// of an odd byte the second's sum, of an even one the second's plus 16 times the odd byte's first. From the former on,
// one after another follow from these (add_to).
template <int V>
struct Pair {
  __m256i all[V], upper[V];

  // Adds to sums of 16 bits, [V][two blocks][16 channels], or, at first, writes there.
  void add_to(uint16_t* first, uint16_t* second, bool at_first) const {
    const __m256i low = _mm256_set1_epi16(255);
    const auto add = [&](uint16_t* sums, int block, __m256i count) {
      __m256i* to = reinterpret_cast<__m256i*>(sums) + block;
      _mm256_store_si256(to, at_first ? count : _mm256_add_epi16(count, _mm256_load_si256(to)));
    };
    const auto without = [&](__m256i sum, __m256i part) {
      return _mm256_and_si256(_mm256_sub_epi16(sum, _mm256_slli_epi16(part, 4)), low);
    };
    FOLDBIT_UNROLL
    for (int v = 0; v < V; ++v) {
      const __m256i second_odd = _mm256_srli_epi16(upper[v], 8);
      const __m256i first_odd = without(_mm256_srli_epi16(all[v], 8), second_odd);
      const __m256i second_even = without(upper[v], first_odd);
      const __m256i first_even = without(all[v], second_even);
      add(first, 2 * v, first_even);
      add(first, 2 * v + 1, first_odd);
      add(second, 2 * v, second_even);
      add(second, 2 * v + 1, second_odd);
    }
  }
};

// What a pair's tables say of the weights' nibbles [0, nibbles), or a few more.
template <int V>
Pair<V> look_up(const uint16_t* tables, const __m256i* weights, int nibbles) {
  __m256i all[V], upper[V];
  FOLDBIT_UNROLL
  for (int v = 0; v < V; ++v) all[v] = upper[v] = _mm256_setzero_si256();
  for (const uint16_t* end = tables + nibbles; tables < end; tables += kStep, weights += kStep * V) {
    __m256i table[kStep];
    FOLDBIT_UNROLL
    for (int i = 0; i < kStep; ++i)
      table[i] = _mm256_broadcastsi128_si256(
          _mm_load_si128(reinterpret_cast<const __m128i*>(reinterpret_cast<const int64_t*>(kDiffer.of) + tables[i])));
    FOLDBIT_UNROLL
    for (int v = 0; v < V; ++v) {
      __m256i t = _mm256_shuffle_epi8(table[0], _mm256_load_si256(weights + v));
      FOLDBIT_UNROLL
      for (int i = 1; i < kStep; ++i)
        t = _mm256_add_epi8(t, _mm256_shuffle_epi8(table[i], _mm256_load_si256(weights + i * V + v)));
      FOLDBIT_ADD_BYTES(all[v], t);
      FOLDBIT_ADD_BYTES(upper[v], _mm256_srli_epi16(t, 4));
    }
  }
  Pair<V> pair;
  FOLDBIT_UNROLL
  for (int v = 0; v < V; ++v) {
    pair.all[v] = all[v];
    pair.upper[v] = upper[v];
  }
  return pair;
}

// Sums [A][kLookupPixels][pixel_sums] of a piece to its output.
template <class P, template <class, int> class Output, int A>
void finish_sums(const Conv& conv, const Piece& piece, const Axes& axes, const Place& at, int64_t blocks,
                 const uint16_t* sums, int64_t pixel_sums) {
  for (int64_t y = piece.y_begin; y < piece.y_end; ++y)
    for (int64_t x = piece.x_begin; x < piece.x_end;) {
      const Span span = axes.x.span(x, piece.x_end);
      const int64_t taps = axes.y.span(y, y + 1).taps.count() * span.taps.count();
      const Place there = place_at(conv, at, piece.image, y, x, taps);
      for (int b = 0; b < blocks; ++b) {
        const Output<P, A> output(conv, there, b);
        for (int64_t p = 0; p < span.count(); ++p) {
          typename P::Ints planes[A];
          for (int a = 0; a < A; ++a)
            planes[a] = P::from_uint16(sums + (a * kLookupPixels + p) * pixel_sums + b * kLanes);
          output.write(p, planes);
        }
      }
      sums += span.count() * pixel_sums;
      x = span.end;
    }
}

// A plane of a pixel: its first tap inside the image, and its sums.
struct Pixel {
  const uint32_t* activations;
  uint16_t* sums;
};

// A piece's sums, of two activation planes or one, and the words looked up at a time.
template <int A, int V>
struct Lookup {
  static constexpr int64_t kPixel = V * 2 * kLanes;
  static constexpr int64_t kPlane = kLookupPixels * kPixel;
  static constexpr int kWords = kLookupWords / V;
  static constexpr int kLookups = kWords * kNibbles + kStep - 1;
  alignas(32) uint16_t sums[A * kPlane];
  alignas(32) uint16_t spare[kPixel];
  alignas(32) uint8_t nibbles[kLookups * V * 32];
  uint16_t tables[kLookups];
  WordRuns runs;
  bool at_first;

  void pair(const Pixel& first, const Pixel& second) {
    find_tables(first.activations, second.activations, runs, tables);
    bool written = !at_first;
    for (int i = 0; i < runs.stretch_count; ++i)
      for (int begin = runs.stretches[i].begin, end = begin + runs.stretches[i].count; begin < end;
           begin += kMostNibbles) {
        const __m256i* weights = reinterpret_cast<const __m256i*>(nibbles) + begin * V;
        look_up<V>(tables + begin, weights, static_cast<int>(smaller(end - begin, kMostNibbles))).add_to(first.sums, second.sums, !written);
        written = true;
      }
    if (!written) look_up<V>(tables, nullptr, 0).add_to(first.sums, second.sums, true);
  }

  // All pixels of two spans.
  void spans(const Conv& conv, const Operands& from, const Axes& axes, const Piece& piece, const Span& rows,
             const Span& columns) {
    const int64_t width = piece.x_end - piece.x_begin, step = conv.stride_w * from.activation_x;
    Pixel waiting = {nullptr, nullptr};
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      Pixel pixel = {from.activations + axes.y.tap(y, rows.taps.begin) * from.activation_y +
                         axes.x.tap(columns.begin, columns.taps.begin) * from.activation_x,
                     sums + ((y - piece.y_begin) * width + columns.begin - piece.x_begin) * kPixel};
      for (int64_t x = columns.begin; x < columns.end; ++x, pixel.activations += step, pixel.sums += kPixel) {
        if (A == 2) {
          pair(pixel, {pixel.activations + conv.activation_plane, pixel.sums + kPlane});
        } else if (waiting.sums) {
          pair(waiting, pixel);
          waiting.sums = nullptr;
        } else {
          waiting = pixel;
        }
      }
    }
    if (waiting.sums) pair(waiting, {waiting.activations, spare});
  }
};

// One weight plane, A activation planes and some blocks of channels, at most 2 * V, through a piece.
template <class P, int A, int V>
void look_up_planes(const Conv& conv, const Piece& piece, const Axes& axes, const Place& at, int64_t blocks) {
  Lookup<A, V> lookup;
  const Operands from(conv, piece.image, at);
  const int64_t words = conv.kernel_h * conv.kernel_w * conv.words;
  const int64_t at_once = ceil_div(words, ceil_div(words, lookup.kWords));
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
        if (lookup.runs.count || lookup.at_first) lookup.spans(conv, from, axes, piece, rows, columns);
      }
    }
  }

  if (conv.integers)
    finish_sums<P, IntegerOutput, A>(conv, piece, axes, at, blocks, lookup.sums, lookup.kPixel);
  else
    finish_sums<P, FloatOutput, A>(conv, piece, axes, at, blocks, lookup.sums, lookup.kPixel);
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
