// What the algorithms share. They are written once, in the headers kernel_*.h, over a small vector
// policy V; each instruction set's file supplies a V.
//
// V has kLanes lanes:
//   Words    kLanes uint32          no_words(); load, broadcast, store
//   Counts   kLanes partial counts  no_counts(); count(c, a, w): c plus the set bits of a xor w
//   Ints     kLanes int32           no_ints(); widen(sum, c): sum plus the counts, of at most kRoom calls
//                                   matches(k, c): k - 2 * c; store; to_float
//   Marks    32 counts, of channels no_marks(); count_marks(m, a, w): m plus the bits of a xor w, each where it
//                                   belongs, of at most kMaxDepthwiseTaps calls; marks_of(m, half): Ints
//   Floats   kLanes float           load, store, broadcast, add, mul
//                                   leaky(x, slope): x < 0 ? slope * x : x;  at_least(x, low): x < low ? low : x
//   packing                         negative(r): bit i set where r_i < 0; below(x, t): where x_i < t_i; below(x0, x1,
//                                   t0, t1): of 32
//                                   residual(r, v): r - (r < 0 ? -v : v)
//                                   mark(w, r, bit): w | (r < 0 ? bit : 0)
//                                   mark_lanes(w, lanes, bit): w | bit in the lanes whose bit is set
//   kBlocks, kAccumulators          blocks a tile takes (1 or 2); Counts that stay in registers
//   kMarks                          Marks that stay in registers
//
// Everything in these headers is in an unnamed namespace on purpose, and calls no inline function from
// elsewhere, std:: included: a shared inline function compiled in the AVX-512 file could be the copy the
// linker keeps, and would then run on machines without AVX-512.
#pragma once

#include <limits.h>
#include <string.h>

#include "foldbit.h"

// Small loops over a tile: unrolled, so that its counts live in registers.
#if defined(__clang__)
#define FOLDBIT_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define FOLDBIT_UNROLL _Pragma("GCC unroll 32")
#else
#define FOLDBIT_UNROLL
#endif

#if defined(__GNUC__)
#define FOLDBIT_NOINLINE __attribute__((noinline))
#define FOLDBIT_INLINE __attribute__((always_inline)) inline
#elif defined(_MSC_VER)
#define FOLDBIT_NOINLINE __declspec(noinline)
#define FOLDBIT_INLINE __forceinline
#else
#define FOLDBIT_NOINLINE
#define FOLDBIT_INLINE inline
#endif

namespace foldbit {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }  // b > 0

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// The first lanes only, for the ends of rows of channels or pixels; the rest reads as 0.
template <class V>
typename V::Floats load_some(const float* from, int lanes) {
  if (lanes == kLanes) return V::load(from);
  float all[kLanes] = {};
  memcpy(all, from, lanes * sizeof(float));
  return V::load(all);
}

template <class V, class T, class Vector>
void store_some(T* to, Vector value, int lanes) {
  if (lanes == kLanes) return V::store(to, value);
  T all[kLanes];
  V::store(all, value);
  memcpy(to, all, lanes * sizeof(T));
}

}  // namespace
}  // namespace foldbit
