// The run-time choice of an instruction set: here and nowhere else.

#include <atomic>
#include <cstring>

#include "foldbit.h"

namespace foldbit {
namespace {

uint32_t supported_features() {
  uint32_t supported = 0;
#ifdef FOLDBIT_X86
  // These also ask whether the operating system saves the wider registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) supported |= kAvx2;
  if (__builtin_cpu_supports("avx512f")) supported |= kAvx512F;
  if (__builtin_cpu_supports("avx512vpopcntdq")) supported |= kAvx512Vpopcntdq;
#endif
  return supported;
}

std::atomic<const Kernels*> forced{nullptr};

}  // namespace

std::vector<const Kernels*> runnable_kernels() {
  static const uint32_t supported = supported_features();
  std::vector<const Kernels*> runnable;
  for (const Kernels* kernels : {
           &portable_kernels,
#ifdef FOLDBIT_X86
           &avx2_kernels,
           &avx512_kernels,
#endif
#ifdef FOLDBIT_NEON
           &neon_kernels,
#endif
       })
    if ((supported & kernels->required) == kernels->required) runnable.push_back(kernels);
  return runnable;
}

const Kernels& current_kernels() {
  static const Kernels* const best = runnable_kernels().back();
  const Kernels* kernels = forced.load();
  return kernels ? *kernels : *best;
}

template <>
const RowKernels<float>& current_row_kernels() {
  return current_kernels().float_rows;
}

template <>
const RowKernels<double>& current_row_kernels() {
  return current_kernels().double_rows;
}

bool force_kernels(const char* name) {
  for (const Kernels* kernels : runnable_kernels())
    if (std::strcmp(kernels->name, name) == 0) {
      forced.store(kernels);
      return true;
    }
  return false;
}

}  // namespace foldbit
