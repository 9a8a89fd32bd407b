// The part of the Python module foldbit._native that training's passes over rows need.

#include <nanobind/stl/string.h>

#include <limits>
#include <string>

#include "foldbit.h"
#include "python_arrays.h"
#include "rows.h"

namespace foldbit {
namespace {

Array as_array(const char* name, nb::handle given) {
  Array x;
  if (!nb::try_cast(given, x, false)) {
    const std::string type = nb::cast<std::string>(nb::type_name(given.type()));
    throw nb::type_error((std::string(name) + " must be a float32 or float64 array [rows, n], got " + type).c_str());
  }
  const bool fits = (x.dtype() == nb::dtype<float>() || x.dtype() == nb::dtype<double>()) &&
                    x.device_type() == nb::device::cpu::value && x.ndim() == 2;
  if (!fits) {
    throw nb::type_error(
        (std::string(name) + " must be a float32 or float64 CPU array [rows, n], got " + describe(x)).c_str());
  }
  require(x.size() == 0 || x.shape(1) == 1 || x.stride(1) == 1,
          std::string("the elements of a row of ") + name + " must lie side by side in memory, got stride " +
              std::to_string(x.stride(1)) + "; copy it first (numpy.ascontiguousarray)");
  return x;
}

// Another matrix of the shape and type of x.
Array like(const char* name, nb::handle given, const Array& x) {
  const Array other = as_array(name, given);
  require(other.dtype() == x.dtype() && other.shape(0) == x.shape(0) && other.shape(1) == x.shape(1),
          std::string(name) + " must be of the type and shape of x, " + describe(x) + ", got " + describe(other));
  return other;
}

template <class T>
Rows<T> rows_of(const Array& x) {
  return {static_cast<T*>(const_cast<void*>(static_cast<const void*>(x.data()))), x.stride(0)};
}

// Scales [rows, planes] of x, dense.
Array scales_of(nb::handle given, const Array& x) {
  const Array scales = as_array("scales", given);
  require(scales.dtype() == x.dtype() && scales.shape(0) == x.shape(0) && 1 <= scales.shape(1) &&
              scales.shape(1) <= kMaxPlanes,
          "scales must be of the type of x, [rows, 1 to " + std::to_string(kMaxPlanes) + "], got " +
              describe(scales) + " for x " + describe(x));
  require(scales.size() == 0 || scales.shape(0) == 1 || scales.stride(0) == static_cast<int64_t>(scales.shape(1)),
          "scales must be C-contiguous; copy them first (numpy.ascontiguousarray)");
  return scales;
}

void require_writable(nb::handle given) {
  nb::ndarray<> out;
  if (!nb::try_cast(given, out, false)) throw nb::type_error("out must be a writable array");
}

void check_numbers(double clamp, int threads) {
  require(clamp > 0, "clamp must be positive, got " + std::to_string(clamp));
  require(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
}

// Call body(T()) with the element type of x, without the GIL.
template <class Body>
void typed(const Array& x, const Body& body) {
  const nb::gil_scoped_release release;
  if (x.dtype() == nb::dtype<float>()) {
    body(float());
  } else {
    body(double());
  }
}

void approximate_rows_py(nb::handle x_given, nb::handle scales_given, nb::handle out_given, double clamp,
                         int threads) {
  const Array x = as_array("x", x_given), scales = scales_of(scales_given, x), out = like("out", out_given, x);
  require_writable(out_given);
  check_numbers(clamp, threads);
  typed(x, [&](auto zero) {
    using T = decltype(zero);
    approximate_rows(rows_of<const T>(x), static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)),
                     static_cast<const T*>(scales.data()), static_cast<int>(scales.shape(1)), static_cast<T>(clamp),
                     rows_of<T>(out), threads);
  });
}

void window_rows_py(nb::handle grad_given, nb::handle x_given, nb::handle scales_given,
                    const std::string& estimator, nb::handle out_given, double clamp, int threads) {
  const Array x = as_array("x", x_given), grad = like("grad", grad_given, x);
  const Array scales = scales_of(scales_given, x), out = like("out", out_given, x);
  require_writable(out_given);
  check_numbers(clamp, threads);
  Window window{};
  if (estimator == "identity") {
    window = Window::identity;
  } else if (estimator == "clipped") {
    window = Window::clipped;
  } else if (estimator == "scaled") {
    window = Window::scaled;
  } else if (estimator == "polynomial") {
    window = Window::polynomial;
  } else {
    require(false, "estimator must be identity, clipped, scaled or polynomial, got '" + estimator + "'");
  }
  typed(x, [&](auto zero) {
    using T = decltype(zero);
    window_rows(rows_of<const T>(grad), rows_of<const T>(x), static_cast<int64_t>(x.shape(0)),
                static_cast<int64_t>(x.shape(1)), static_cast<const T*>(scales.data()),
                static_cast<int>(scales.shape(1)), window, static_cast<T>(clamp), rows_of<T>(out), threads);
  });
}

nb::object greedy_rows_py(nb::handle given, int planes, int threads, double clamp) {
  const Array x = as_array("x", given);
  require(x.shape(1) > 0, "x must have at least one element a row, got " + describe(x));
  require(1 <= planes && planes <= kMaxPlanes,
          "planes must be 1 to " + std::to_string(kMaxPlanes) + ", got " + std::to_string(planes));
  check_numbers(clamp, threads);
  const int64_t rows = dim(x, 0);
  NewArray<double> scales({rows, planes});
  typed(x, [&](auto zero) {
    using T = decltype(zero);
    greedy_rows(rows_of<const T>(x), rows, dim(x, 1), planes, static_cast<T>(clamp), scales.memory.get(), threads);
  });
  return scales.release();
}

}  // namespace

void bind_rows(nb::module_& m) {
  constexpr double kUnlimited = std::numeric_limits<double>::infinity();
  m.def("approximate_rows", &approximate_rows_py, "x"_a.none(), "scales"_a.none(), "out"_a.none(),
        "clamp"_a = kUnlimited, "threads"_a = 1);
  m.def("window_rows", &window_rows_py, "grad"_a.none(), "x"_a.none(), "scales"_a.none(), "estimator"_a,
        "out"_a.none(), "clamp"_a = kUnlimited, "threads"_a = 1);
  m.def("greedy_rows", &greedy_rows_py, "x"_a.none(), "planes"_a, "threads"_a = 1, "clamp"_a = kUnlimited,
        "Greedy scales, [rows, n] -> [rows, planes]; the first alone is the exact one of a single plane.");
}

}  // namespace foldbit
