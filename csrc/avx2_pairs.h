// AVX2: counting by looking up. AVX2 cannot count bits, but a byte shuffle looks 32 nibbles up at once. A nibble of
// one activation word and one of another choose a table, of what each differs by from every possible nibble of a
// weight, in the two halves of a byte. The weights' nibbles of 32 output channels are the places looked at:
//   32 channels x 4 bits x 2 activations = one shuffle, and one and two thirds additions or shifts.
#pragma once

#include <immintrin.h>

#include "kernel.h"

// sum += bytes, where the sum is. Left to itself GCC adds elsewhere and copies the sum back at every turn of a loop.
#if defined(__GNUC__)
#define FOLDBIT_ADD_BYTES(sum, bytes) __asm__("vpaddb {%1, %0, %0|%0, %0, %1}" : "+x"(sum) : "x"(bytes))
#else
#define FOLDBIT_ADD_BYTES(sum, bytes) sum = _mm256_add_epi8(sum, bytes)
#endif

namespace foldbit {
namespace {

constexpr int kNibbles = 8;        // of a word
constexpr int kStep = 3;           // nibbles whose differences fit half a byte
constexpr int kMostNibbles = 63;   // whose differences fit a byte

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

// Words of blocks of 16 channels, as nibbles to look up: [nibbles][V][two blocks' channels in turn]; and kStep - 1
// more, that look nothing up.
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
  for (int i = 0; i < (kStep - 1) * V; ++i)
    _mm256_store_si256(reinterpret_cast<__m256i*>(out) + kNibbles * words * V + i, _mm256_set1_epi8(-128));
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

// The places of the tables of all nibbles of two activations' words, side by side.
void find_tables(const uint32_t* first, const uint32_t* second, int words, uint16_t* out) {
  const __m128i *a = reinterpret_cast<const __m128i*>(first), *b = reinterpret_cast<const __m128i*>(second);
  __m128i* to = reinterpret_cast<__m128i*>(out);
  const auto two_words = [](__m128i first_words, __m128i second_words) {
    return TablePlaces(_mm256_castsi128_si256(_mm_unpacklo_epi8(first_words, second_words)));
  };
  int left = words;
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
    const TablePlaces places = two_words(_mm_cvtsi32_si128(static_cast<int>(first[words - 1])),
                                         _mm_cvtsi32_si128(static_cast<int>(second[words - 1])));
    _mm_storeu_si128(to, _mm256_castsi256_si128(places.first()));
  }
}

// What two activations differ by from V * 32 channels in nibbles [0, nibbles), at most kMostNibbles, is added to sums
// of 16 bits, [V][two blocks][16 channels], or, at first, written there. Reads up to kStep - 1 more tables and weights,
// one of which says nothing: kNoPair, or what as_nibbles ends with.
//
// A byte t of a table is first + 16 * second, and so is the sum of kStep of them, for neither is more than 4. Over many
// steps are kept, modulo 256 each byte,
//   all = sum of t,  upper = sum of t / 16, taken of two bytes at a time:
// of an odd byte the second's sum, of an even one the second's plus 16 times the odd byte's first. From the former on,
// one after another follow from these.
template <int V, bool kFirst>
FOLDBIT_NOINLINE void look_up(const uint16_t* tables, const __m256i* weights, int nibbles, uint16_t* first,
                              uint16_t* second) {
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
  const auto add = [](uint16_t* sums, int block, __m256i count) {
    __m256i* to = reinterpret_cast<__m256i*>(sums) + block;
    _mm256_store_si256(to, kFirst ? count : _mm256_add_epi16(count, _mm256_load_si256(to)));
  };
  const __m256i low = _mm256_set1_epi16(255);
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

}  // namespace
}  // namespace foldbit
