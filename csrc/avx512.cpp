// AVX-512 with VPOPCNTDQ: popcount of 16 words in one instruction.

#include <immintrin.h>

#include "kernel_conv.h"
#include "kernel_depthwise.h"
#include "kernel_fold.h"
#include "kernel_pack.h"

namespace foldbit {
namespace {

struct Avx512 {
  using Words = __m512i;
  using Counts = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int kRoom = INT_MAX;  // counts are full integers already
  static constexpr int kBlocks = 2;
  static constexpr int kAccumulators = 16;  // of 32 registers; more than 24 spill

  static Words no_words() { return _mm512_setzero_si512(); }
  static Words load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Words broadcast(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
  static void store(uint32_t* p, Words w) { _mm512_storeu_si512(p, w); }

  static Counts no_counts() { return _mm512_setzero_si512(); }
  static Counts count(Counts c, Words a, Words w) {
    return _mm512_add_epi32(c, _mm512_popcnt_epi32(_mm512_xor_si512(a, w)));
  }

  static Ints no_ints() { return _mm512_setzero_si512(); }
  static Ints widen(Ints sum, Counts c) { return _mm512_add_epi32(sum, c); }
  static Ints matches(int32_t k, Ints c) {
    return _mm512_sub_epi32(_mm512_set1_epi32(k), _mm512_add_epi32(c, c));
  }
  static void store(int32_t* p, Ints i) { _mm512_storeu_si512(p, i); }
  static Floats to_float(Ints i) { return _mm512_cvtepi32_ps(i); }

  static __m512i places() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  struct Marks {
    __m512i half[2];
  };
  static constexpr int kMarks = 8;
  static Marks no_marks() { return {{no_ints(), no_ints()}}; }
  static Marks count_marks(Marks m, uint32_t a, uint32_t w) {
    const __m512i differ = _mm512_xor_si512(broadcast(a), broadcast(w));
    for (int i = 0; i < 2; ++i) {
      const __m512i bits = _mm512_sllv_epi32(broadcast(1u << 16 * i), places());
      const __mmask16 own = _mm512_test_epi32_mask(differ, bits);
      m.half[i] = _mm512_mask_add_epi32(m.half[i], own, m.half[i], _mm512_set1_epi32(1));
    }
    return m;
  }
  static Ints marks_of(const Marks& m, int half) { return m.half[half]; }

  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static Floats broadcast(float value) { return _mm512_set1_ps(value); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static void store(float* p, Floats f) { _mm512_storeu_ps(p, f); }
  static Floats at_least(Floats x, Floats low) { return _mm512_max_ps(low, x); }  // x where that is no number
  static Floats leaky(Floats x, Floats slope) { return _mm512_mask_mul_ps(x, below_zero(x), x, slope); }

  static __mmask16 below_zero(Floats r) { return _mm512_cmp_ps_mask(r, _mm512_setzero_ps(), _CMP_LT_OQ); }
  static uint32_t negative(Floats r) { return below_zero(r); }
  static uint32_t below(Floats x, Floats t) { return _mm512_cmp_ps_mask(x, t, _CMP_LT_OQ); }
  static uint32_t below(const Floats& x0, const Floats& x1, const Floats& t0, const Floats& t1) {
    return below(x0, t0) | below(x1, t1) << kLanes;
  }
  static Floats residual(Floats r, Floats v) {
    return _mm512_mask_add_ps(_mm512_sub_ps(r, v), below_zero(r), r, v);
  }
  static Words mark(Words w, Floats r, uint32_t bit) {
    return _mm512_mask_or_epi32(w, below_zero(r), w, broadcast(bit));
  }
  static Words mark_lanes(Words w, uint32_t lanes, uint32_t bit) {
    return _mm512_mask_or_epi32(w, static_cast<__mmask16>(lanes), w, broadcast(bit));
  }
};

}  // namespace

const Kernels avx512_kernels = {
    "avx512", kAvx512F | kAvx512Vpopcntdq, pack_row<Avx512>, conv_piece<Avx512>, depthwise_piece<Avx512>,
    kRowPixels, Avx512::kBlocks, row_kernels<float>(), row_kernels<double>()};

}  // namespace foldbit
