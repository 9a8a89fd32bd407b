// Cuts rows into runs and shares these among threads. Where the cuts lie depends on the sizes alone, so sums do
// not depend on the number of threads.

#include "rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "foldbit.h"
#include "threads.h"

namespace foldbit {
namespace {

constexpr int64_t kRun = 16384;  // values: some microseconds of work, and within the nearest caches

int64_t runs_of(int64_t n) { return (n + kRun - 1) / kRun; }

// Call body(row, begin, end) for runs of a row, or for whole short rows, several of them in one task.
template <class Body>
void for_runs(int64_t rows, int64_t n, int threads, const Body& body) {
  if (rows == 0 || n == 0) return;
  const int64_t runs = runs_of(n), batch = std::max<int64_t>(1, kRun / n);
  parallel_for((rows + batch - 1) / batch * runs, threads, [&](int64_t task) {
    const int64_t first = task / runs * batch, begin = task % runs * kRun;
    for (int64_t row = first; row < std::min(first + batch, rows); ++row) {
      body(row, begin, std::min(begin + kRun, n));
    }
  });
}

}  // namespace

template <class T>
void approximate_rows(Rows<const T> x, int64_t rows, int64_t n, const T* scales, int planes, T limit, Rows<T> out,
                      int threads) {
  const RowKernels<T>& kernels = current_row_kernels<T>();
  for_runs(rows, n, threads, [&](int64_t row, int64_t begin, int64_t end) {
    kernels.approximate(x.row(row) + begin, end - begin, scales + row * planes, planes, limit,
                        out.row(row) + begin);
  });
}

template <class T>
void window_rows(Rows<const T> grad, Rows<const T> x, int64_t rows, int64_t n, const T* scales, int planes,
                 Window window, T limit, Rows<T> out, int threads) {
  const RowKernels<T>& kernels = current_row_kernels<T>();
  for_runs(rows, n, threads, [&](int64_t row, int64_t begin, int64_t end) {
    kernels.window(grad.row(row) + begin, x.row(row) + begin, end - begin, scales + row * planes, planes, window,
                   limit, out.row(row) + begin);
  });
}

template <class T>
void greedy_rows(Rows<const T> x, int64_t rows, int64_t n, int planes, T limit, double* scales, int threads) {
  const RowKernels<T>& kernels = current_row_kernels<T>();
  const int64_t runs = runs_of(n);
  std::vector<double> sums(static_cast<size_t>(rows * runs));
  for (int p = 0; p < planes; ++p) {
    for_runs(rows, n, threads, [&](int64_t row, int64_t begin, int64_t end) {
      sums[static_cast<size_t>(row * runs + begin / kRun)] =
          kernels.left(x.row(row) + begin, end - begin, scales + row * planes, p, limit);
    });
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0;
      for (int64_t run = 0; run < runs; ++run) sum += sums[static_cast<size_t>(row * runs + run)];
      const double mean = sum / static_cast<double>(n);
      scales[row * planes + p] = std::isfinite(mean) ? mean : std::numeric_limits<double>::quiet_NaN();
    }
  }
}

#define FOLDBIT_INSTANTIATE(T)                                                                                  \
  template void approximate_rows(Rows<const T>, int64_t, int64_t, const T*, int, T, Rows<T>, int);              \
  template void window_rows(Rows<const T>, Rows<const T>, int64_t, int64_t, const T*, int, Window, T, Rows<T>,  \
                            int);                                                                               \
  template void greedy_rows(Rows<const T>, int64_t, int64_t, int, T, double*, int);
FOLDBIT_INSTANTIATE(float)
FOLDBIT_INSTANTIATE(double)
#undef FOLDBIT_INSTANTIATE

}  // namespace foldbit
