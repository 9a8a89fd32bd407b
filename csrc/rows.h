// Training's passes over rows of values: a row is a set of elements that share scales. Raw pointers, neither
// Python nor torch. T is float or double.
//
// Everywhere here values are first clipped to [-limit, limit], an infinite limit clipping nothing, and the
// clipped values are never written down.
#pragma once

#include <cstdint>

namespace foldbit {

// Which gradient passes: src/foldbit/nn/estimators.py tells.
enum class Window { identity, clipped, scaled, polynomial };

// What one look at all magnitudes tells.
template <class T>
struct Summary {
  double sum;         // NaN if one of them is
  T lowest, highest;  // of the others
};

// Where magnitudes lie on a ruler: (|x| - lowest) * per_unit, at most last, rounded down.
template <class T>
struct Ruler {
  T lowest, per_unit, last;
};

// What one instruction set offers, for a run of n values of one row: the passes below, and what the solvers
// (solve.h) are made of.
template <class T>
struct RowKernels {
  void (*approximate)(const T* x, int64_t n, const T* scales, int planes, T limit, T* out);
  void (*window)(const T* grad, const T* x, int64_t n, const T* scales, int planes, Window window, T limit,
                 T* out);
  double (*left)(const T* x, int64_t n, const double* scales, int planes, T limit);
  Summary<T> (*summarize)(const T* x, int64_t n, T limit);
  void (*places)(const T* x, int64_t n, Ruler<T> ruler, T limit, int32_t* places);
};

// A matrix [rows, n], contiguous within a row.
template <class T>
struct Rows {
  T* data;
  int64_t stride;  // elements from one row to the next

  T* row(int64_t i) const { return data + i * stride; }
};

// out = sum over planes p of scales[p] * s_p, with s_p the sign of what the planes before p left of x.
//   scales [rows, planes], 1 to kMaxPlanes planes
template <class T>
void approximate_rows(Rows<const T> x, int64_t rows, int64_t n, const T* scales, int planes, T limit, Rows<T> out,
                      int threads);

// out = grad times the window at x, and 0 where the clip, if there is one, cuts x or x is NaN.
template <class T>
void window_rows(Rows<const T> grad, Rows<const T> x, int64_t rows, int64_t n, const T* scales, int planes,
                 Window window, T limit, Rows<T> out, int threads);

// Greedy scales: v_p = mean|r|, r -= v_p * sign(r), from r = x on; the first alone is exact for one plane. n >= 1.
//   scales [rows, planes]; of a row that holds NaN, or infinity within the limit, NaN
template <class T>
void greedy_rows(Rows<const T> x, int64_t rows, int64_t n, int planes, T limit, double* scales, int threads);

}  // namespace foldbit
