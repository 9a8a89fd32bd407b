// Values to their approximations, gradients to what passes through them, and the sums that greedy scales are made
// of: rows of T, float or double, in one pass each. Plain loops that compilers vectorize for the instruction set
// of the file that includes them; none of their steps depends on how wide the vectors are.
#pragma once

#include <math.h>

#include "kernel.h"

namespace foldbit {
namespace {

inline float absolute(float x) { return fabsf(x); }
inline double absolute(double x) { return fabs(x); }

// Clip to [-limit, limit]; NaN stays NaN.
template <class T>
inline T clip(T x, T limit) {
  x = -limit > x ? -limit : x;
  return limit < x ? limit : x;
}

template <class T>
inline T clipped_magnitude(T x, T limit) {
  x = absolute(x);
  return limit < x ? limit : x;
}

template <class T, int kPlanes>
void approximate_planes(const T* x, int64_t n, const T* scales, T limit, T* out) {
  T v[kPlanes];
  for (int p = 0; p < kPlanes; ++p) v[p] = scales[p];
  for (int64_t i = 0; i < n; ++i) {
    T r = clip(x[i], limit);
    T part = r < 0 ? -v[0] : v[0];
    T total = part;
    FOLDBIT_UNROLL
    for (int p = 1; p < kPlanes; ++p) {
      r -= part;
      part = r < 0 ? -v[p] : v[p];
      total += part;
    }
    out[i] = total;
  }
}

template <class T>
void approximate_run(const T* x, int64_t n, const T* scales, int planes, T limit, T* out) {
  switch (planes) {
    case 1: return approximate_planes<T, 1>(x, n, scales, limit, out);
    case 2: return approximate_planes<T, 2>(x, n, scales, limit, out);
    case 3: return approximate_planes<T, 3>(x, n, scales, limit, out);
    case 4: return approximate_planes<T, 4>(x, n, scales, limit, out);
    case 5: return approximate_planes<T, 5>(x, n, scales, limit, out);
    case 6: return approximate_planes<T, 6>(x, n, scales, limit, out);
    case 7: return approximate_planes<T, 7>(x, n, scales, limit, out);
    case 8: return approximate_planes<T, 8>(x, n, scales, limit, out);
  }
}

// What the clip cuts gets exactly 0, even where the gradient is not finite; and so does NaN, if there is a clip.
template <bool kClips, class T>
inline T where_not_cut(T x, T limit, T grad) {
  return !kClips || absolute(x) <= limit ? grad : T(0);
}

template <bool kClips, class T>
void window_identity(const T* grad, const T* x, int64_t n, T limit, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = where_not_cut<kClips>(x[i], limit, grad[i]);
}

template <bool kClips, class T>
void window_within(const T* grad, const T* x, int64_t n, T reach, T limit, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const T inside = absolute(clip(x[i], limit)) <= reach ? T(1) : T(0);
    out[i] = where_not_cut<kClips>(x[i], limit, grad[i] * inside);
  }
}

template <bool kClips, int kPlanes, class T>
void window_polynomial(const T* grad, const T* x, int64_t n, const T* scales, T limit, T* out) {
  T v[kPlanes], reach[kPlanes];
  for (int p = 0; p < kPlanes; ++p) {
    v[p] = scales[p];
    reach[p] = v[p] > 0 ? 2 * v[p] : T(1);
  }
  for (int64_t i = 0; i < n; ++i) {
    T r = clip(x[i], limit);
    T window = 0;
    FOLDBIT_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      T triangle = 1 - absolute(r) / reach[p];
      triangle = 0 > triangle ? T(0) : triangle;
      window += v[p] > 0 ? triangle : T(0);
      r -= r < 0 ? -v[p] : v[p];
    }
    out[i] = where_not_cut<kClips>(x[i], limit, grad[i] * window);
  }
}

template <bool kClips, class T>
void window_any(const T* grad, const T* x, int64_t n, const T* scales, int planes, Window window, T limit, T* out) {
  switch (window) {
    case Window::identity: return window_identity<kClips>(grad, x, n, limit, out);
    case Window::clipped: return window_within<kClips>(grad, x, n, T(1), limit, out);
    case Window::scaled: return window_within<kClips>(grad, x, n, kClips ? limit : 3 * scales[0], limit, out);
    case Window::polynomial: break;
  }
  switch (planes) {
    case 1: return window_polynomial<kClips, 1>(grad, x, n, scales, limit, out);
    case 2: return window_polynomial<kClips, 2>(grad, x, n, scales, limit, out);
    case 3: return window_polynomial<kClips, 3>(grad, x, n, scales, limit, out);
    case 4: return window_polynomial<kClips, 4>(grad, x, n, scales, limit, out);
    case 5: return window_polynomial<kClips, 5>(grad, x, n, scales, limit, out);
    case 6: return window_polynomial<kClips, 6>(grad, x, n, scales, limit, out);
    case 7: return window_polynomial<kClips, 7>(grad, x, n, scales, limit, out);
    case 8: return window_polynomial<kClips, 8>(grad, x, n, scales, limit, out);
  }
}

template <class T>
void window_run(const T* grad, const T* x, int64_t n, const T* scales, int planes, Window window, T limit,
                T* out) {
  if (limit < T(INFINITY)) return window_any<true>(grad, x, n, scales, planes, window, limit, out);
  window_any<false>(grad, x, n, scales, planes, window, limit, out);
}

// The sum of |…||x| − v_1| … − v_p|: what so many greedy planes leave.
template <class T, int kPlanes>
double left_by_planes(const T* x, int64_t n, const double* scales, T limit) {
  // Independent lanes, always as many: the order of the additions is the same on every instruction set.
  constexpr int kSums = 32;
  double sums[kSums] = {};
  double v[kPlanes + 1];
  for (int p = 0; p < kPlanes; ++p) v[p] = scales[p];
  const auto left = [&v, limit](T value) {
    double r = static_cast<double>(clipped_magnitude(value, limit));
    FOLDBIT_UNROLL
    for (int p = 0; p < kPlanes; ++p) r = absolute(r - v[p]);
    return r;
  };
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int lane = 0; lane < kSums; ++lane) sums[lane] += left(x[i + lane]);
  }
  for (int lane = 0; i < n; ++i, ++lane) sums[lane] += left(x[i]);
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <class T>
double left_run(const T* x, int64_t n, const double* scales, int planes, T limit) {
  switch (planes) {
    case 0: return left_by_planes<T, 0>(x, n, scales, limit);
    case 1: return left_by_planes<T, 1>(x, n, scales, limit);
    case 2: return left_by_planes<T, 2>(x, n, scales, limit);
    case 3: return left_by_planes<T, 3>(x, n, scales, limit);
    case 4: return left_by_planes<T, 4>(x, n, scales, limit);
    case 5: return left_by_planes<T, 5>(x, n, scales, limit);
    case 6: return left_by_planes<T, 6>(x, n, scales, limit);
    default: return left_by_planes<T, 7>(x, n, scales, limit);
  }
}

template <class T>
Summary<T> summarize_run(const T* x, int64_t n, T limit) {
  // Independent lanes, as above; this many, so that compilers make vectors of the loop over lanes instead of
  // unrolling it into scalars.
  constexpr int kSums = 32;
  double sums[kSums];
  T lowest[kSums], highest[kSums];
  for (int lane = 0; lane < kSums; ++lane) {
    sums[lane] = 0;
    lowest[lane] = T(INFINITY);
    highest[lane] = 0;
  }
  const auto add = [&](int lane, T value) {
    const T magnitude = clipped_magnitude(value, limit);
    sums[lane] += static_cast<double>(magnitude);
    lowest[lane] = magnitude < lowest[lane] ? magnitude : lowest[lane];
    highest[lane] = magnitude > highest[lane] ? magnitude : highest[lane];
  };
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int lane = 0; lane < kSums; ++lane) add(lane, x[i + lane]);
  }
  for (int lane = 0; i < n; ++i, ++lane) add(lane, x[i]);
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      sums[lane] += sums[lane + half];
      lowest[lane] = lowest[lane + half] < lowest[lane] ? lowest[lane + half] : lowest[lane];
      highest[lane] = highest[lane + half] > highest[lane] ? highest[lane + half] : highest[lane];
    }
  }
  return {sums[0], lowest[0], highest[0]};
}

template <class T>
void places_run(const T* x, int64_t n, Ruler<T> ruler, T limit, int32_t* places) {
  for (int64_t i = 0; i < n; ++i) {
    const T place = (clipped_magnitude(x[i], limit) - ruler.lowest) * ruler.per_unit;
    places[i] = static_cast<int32_t>(place < ruler.last ? place : ruler.last);
  }
}

template <class T>
constexpr RowKernels<T> row_kernels() {
  return {approximate_run<T>, window_run<T>, left_run<T>, summarize_run<T>, places_run<T>};
}

}  // namespace
}  // namespace foldbit
