// The fastest a core can xor, count and add: the same three instructions a binary dot product needs for every
// 512 bits, on registers alone. What the kernels reach is a share of this.

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>

// Runs `rounds` rounds of 16 times 512 bits. Returns their sum, so that nothing can be left out; 0 where this
// machine lacks the instructions.
__attribute__((target("avx512f,avx512vpopcntdq"))) static int64_t run(int64_t rounds) {
  __m512i counts[16], w = _mm512_set1_epi32(0x5a5a5a5a);
  for (int i = 0; i < 16; ++i) counts[i] = _mm512_set1_epi32(i);
  for (int64_t round = 0; round < rounds; ++round) {
    asm volatile("" : "+v"(w));  // as if it had changed, or the compiler would count once and multiply
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      counts[i] = _mm512_add_epi32(counts[i], _mm512_popcnt_epi32(_mm512_xor_si512(counts[i], w)));
  }
  int64_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += _mm512_reduce_add_epi32(counts[i]);
  return sum;
}

extern "C" int64_t peak(int64_t rounds) {
  const bool can = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vpopcntdq");
  return can ? run(rounds) : 0;
}
#else
extern "C" int64_t peak(int64_t) { return 0; }
#endif
