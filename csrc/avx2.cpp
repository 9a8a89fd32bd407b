// AVX2: differences are looked up (avx2_lookup.h). For few pixels, where bringing the weights into form for that would
// cost more than it gains, and for very long sums, bits are counted: a byte shuffle looks up the bits of 32 nibbles at
// once; the counts stay in bytes while they fit.

#include <immintrin.h>

#include "avx2_lookup.h"
#include "kernel_conv.h"
#include "kernel_depthwise.h"
#include "kernel_fold.h"
#include "kernel_pack.h"

namespace foldbit {
namespace {

struct Avx2 {
  struct Words {
    __m256i half[2];
  };
  using Counts = Words;
  using Ints = Words;
  struct Floats {
    __m256 half[2];
  };
  static constexpr int kRoom = 31;  // a byte counts up to 8 bits a call: 31 * 8 < 256
  static constexpr int kBlocks = 1;
  static constexpr int kAccumulators = 4;  // of 2 registers each, of 16

  static Words both(__m256i v) { return {{v, v}}; }
  static __m256i load_half(const void* p, int i) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p) + i);
  }
  static void store_halves(void* p, const Words& w) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), w.half[0]);
    _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, w.half[1]);
  }

  static Words no_words() { return both(_mm256_setzero_si256()); }
  static Words load(const uint32_t* p) { return {{load_half(p, 0), load_half(p, 1)}}; }
  static Words broadcast(uint32_t word) { return both(_mm256_set1_epi32(static_cast<int>(word))); }
  static void store(uint32_t* p, const Words& w) { store_halves(p, w); }

  static __m256i popcount_bytes(__m256i v) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_and_si256(v, nibble);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    return _mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
  }
  static Counts no_counts() { return no_words(); }
  static Counts count(Counts c, const Words& a, const Words& w) {
    for (int i = 0; i < 2; ++i)
      c.half[i] = _mm256_add_epi8(c.half[i], popcount_bytes(_mm256_xor_si256(a.half[i], w.half[i])));
    return c;
  }

  static Ints no_ints() { return no_words(); }
  static Ints widen(Ints sum, const Counts& c) {
    for (int i = 0; i < 2; ++i) {
      const __m256i pairs = _mm256_maddubs_epi16(c.half[i], _mm256_set1_epi8(1));
      sum.half[i] = _mm256_add_epi32(sum.half[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sum;
  }
  using Marks = __m256i;  // bytes
  static constexpr int kMarks = 8;
  static Marks no_marks() { return _mm256_setzero_si256(); }
  static Marks count_marks(Marks m, uint32_t a, uint32_t w) {
    const __m256i to_bytes = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i own = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const __m256i differ = _mm256_xor_si256(_mm256_set1_epi32(static_cast<int>(a)),
                                            _mm256_set1_epi32(static_cast<int>(w)));
    const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(differ, to_bytes), own);
    return _mm256_sub_epi8(m, _mm256_cmpeq_epi8(bits, own));
  }
  static Ints marks_of(const Marks& m, int half) {
    const __m128i bytes = half ? _mm256_extracti128_si256(m, 1) : _mm256_castsi256_si128(m);
    return {{_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))}};
  }
  // For avx2_lookup.h.
  static Ints from_uint16(const uint16_t* p) {
    const __m128i* from = reinterpret_cast<const __m128i*>(p);
    return {{_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), _mm256_cvtepu16_epi32(_mm_loadu_si128(from + 1))}};
  }
  static Ints matches(int32_t k, Ints c) {
    for (auto& half : c.half) half = _mm256_sub_epi32(_mm256_set1_epi32(k), _mm256_add_epi32(half, half));
    return c;
  }
  static void store(int32_t* p, const Ints& i) { store_halves(p, i); }
  static Floats to_float(const Ints& i) {
    return {{_mm256_cvtepi32_ps(i.half[0]), _mm256_cvtepi32_ps(i.half[1])}};
  }

  static Floats load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  static Floats broadcast(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
  static Floats add(const Floats& a, const Floats& b) {
    return {{_mm256_add_ps(a.half[0], b.half[0]), _mm256_add_ps(a.half[1], b.half[1])}};
  }
  static Floats mul(const Floats& a, const Floats& b) {
    return {{_mm256_mul_ps(a.half[0], b.half[0]), _mm256_mul_ps(a.half[1], b.half[1])}};
  }
  static void store(float* p, const Floats& f) {
    _mm256_storeu_ps(p, f.half[0]);
    _mm256_storeu_ps(p + 8, f.half[1]);
  }

  static Floats at_least(Floats x, const Floats& low) {
    for (int i = 0; i < 2; ++i) x.half[i] = _mm256_max_ps(low.half[i], x.half[i]);  // x where that is no number
    return x;
  }
  static Floats leaky(Floats x, const Floats& slope) {
    for (int i = 0; i < 2; ++i)
      x.half[i] =
          _mm256_blendv_ps(x.half[i], _mm256_mul_ps(x.half[i], slope.half[i]), below_zero(x.half[i]));
    return x;
  }

  // All bits set in the lanes that are negative.
  static __m256 below_zero(__m256 r) { return _mm256_cmp_ps(r, _mm256_setzero_ps(), _CMP_LT_OQ); }
  static uint32_t negative(const Floats& r) {
    return static_cast<uint32_t>(_mm256_movemask_ps(below_zero(r.half[0])) |
                                 _mm256_movemask_ps(below_zero(r.half[1])) << 8);
  }
  static uint32_t below(const Floats& x, const Floats& t) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.half[0], t.half[0], _CMP_LT_OQ)) |
                                 _mm256_movemask_ps(_mm256_cmp_ps(x.half[1], t.half[1], _CMP_LT_OQ)) << 8);
  }
  static uint32_t below(const Floats& x0, const Floats& x1, const Floats& t0, const Floats& t1) {
    const auto bytes = [](const Floats& x, const Floats& t) {  // 4 lanes of a half in turn
      return _mm256_packs_epi32(_mm256_castps_si256(_mm256_cmp_ps(x.half[0], t.half[0], _CMP_LT_OQ)),
                                _mm256_castps_si256(_mm256_cmp_ps(x.half[1], t.half[1], _CMP_LT_OQ)));
    };
    const __m256i all = _mm256_packs_epi16(bytes(x0, t0), bytes(x1, t1));
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(all, in_order)));
  }
  static Floats residual(Floats r, const Floats& v) {
    const __m256 sign_bit = _mm256_set1_ps(-0.0f);
    for (int i = 0; i < 2; ++i) {
      const __m256 sign = _mm256_and_ps(below_zero(r.half[i]), sign_bit);
      r.half[i] = _mm256_sub_ps(r.half[i], _mm256_xor_ps(v.half[i], sign));
    }
    return r;
  }
  static Words mark(Words w, const Floats& r, uint32_t bit) {
    const __m256i bits = _mm256_set1_epi32(static_cast<int>(bit));
    for (int i = 0; i < 2; ++i) {
      const __m256i where = _mm256_castps_si256(below_zero(r.half[i]));
      w.half[i] = _mm256_or_si256(w.half[i], _mm256_and_si256(where, bits));
    }
    return w;
  }
  static Words mark_lanes(Words w, uint32_t lanes, uint32_t bit) {
    const __m256i bits = _mm256_set1_epi32(static_cast<int>(bit));
    for (int i = 0; i < 2; ++i) {
      const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
      const __m256i some = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes >> 8 * i)), own);
      w.half[i] = _mm256_or_si256(w.half[i], _mm256_and_si256(_mm256_cmpeq_epi32(some, own), bits));
    }
    return w;
  }
};

}  // namespace

const Kernels avx2_kernels = {
    "avx2", kAvx2, pack_row<Avx2>, conv_by_lookup<Avx2>, depthwise_piece<Avx2>, kLookupPixels, kLookupBlocks,
    row_kernels<float>(), row_kernels<double>()};

}  // namespace foldbit
