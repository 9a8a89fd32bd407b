// AVX-512 in plain C++, by SIMDe: so that avx512.cpp can be checked on machines that lack it. Found before the
// compiler's own header of this name by tests/native/test_native_core.py.
#pragma once

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// What Debian's version of it leaves out.
typedef simde__mmask16 __mmask16;

static inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  int32_t integers[16];
  float floats[16];
  simde_mm512_storeu_si512(integers, a);
  for (int i = 0; i < 16; ++i) floats[i] = static_cast<float>(integers[i]);
  return simde_mm512_loadu_ps(floats);
}
