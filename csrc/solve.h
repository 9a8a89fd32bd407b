// Scales of least squared error for rows of values, in linear time, each row with a certificate.
#pragma once

#include <cstdint>

namespace foldbit {

enum class SolveScheme {
  two_planes,  // ls-2: magnitudes v1 - v2 and v1 + v2, so 2-means on |x|
  ternary,     // ls-T: magnitudes 0 and 2·v, with v1 = v2 = v
};

// Solve every row of x, [rows, n] with n >= 1: contiguous within a row, `row_stride` elements from one row to
// the next. T is float or double.
//
//   limit           magnitudes are clipped to it, as they are read; infinite for none
//   tolerance       how far from optimal, as a share of ‖x‖², a row may stay; at 1e-12 only rounding is left
//   scales [rows, 2]   v1 and v2, v1 >= v2 >= 0
//   excess [rows]      the certificate, at most the tolerance; up to float64 rounding,
//                      (squared error reached - least squared error) / ‖x‖² <= excess
//
// A row of zeros gets zeros; a row that holds NaN, or infinity within the limit, gets NaN, and no other row does.
template <class T>
void solve_rows(const T* x, int64_t rows, int64_t n, int64_t row_stride, SolveScheme scheme, T limit,
                double tolerance, int threads, double* scales, double* excess);

}  // namespace foldbit
