// The solvers' part of the Python module foldbit._native.

#include <nanobind/stl/string.h>

#include <limits>
#include <string>
#include <type_traits>

#include "python_arrays.h"
#include "solve.h"

namespace foldbit {
namespace {

nb::tuple solve_rows_py(nb::handle given, const std::string& scheme_name, int threads, double tolerance,
                         double clamp) {
  Array x;
  if (!nb::try_cast(given, x, false)) {
    const std::string type = nb::cast<std::string>(nb::type_name(given.type()));
    throw nb::type_error(("x must be a float32 or float64 array [rows, n], got " + type).c_str());
  }
  const bool is_float = x.dtype() == nb::dtype<float>(), is_double = x.dtype() == nb::dtype<double>();
  if (!(is_float || is_double) || x.device_type() != nb::device::cpu::value) {
    const char* const where = x.device_type() == nb::device::cpu::value ? "" : " on another device";
    throw nb::type_error(
        ("x must be a float32 or float64 CPU array [rows, n], got " + describe(x) + where).c_str());
  }
  require(x.ndim() == 2, "x must have two dimensions, [rows, n], got ", describe(x));
  const int64_t rows = dim(x, 0), n = dim(x, 1);
  require(n > 0, "x must have at least one element a row, got ", describe(x));
  require(rows == 0 || n == 1 || x.stride(1) == 1,
          "the elements of a row of x must lie side by side in memory, got stride ", x.stride(1),
          "; copy it first (numpy.ascontiguousarray)");
  require(scheme_name == "ls-2" || scheme_name == "ls-T", "scheme must be 'ls-2' or 'ls-T', got '", scheme_name,
          "'");
  require(threads >= 1, "threads must be at least 1, got ", threads);
  require(tolerance >= 0, "tolerance must be at least 0, got ", tolerance);
  require(clamp > 0, "clamp must be positive, got ", clamp);

  const SolveScheme scheme = scheme_name == "ls-2" ? SolveScheme::two_planes : SolveScheme::ternary;
  NewArray<double> scales({rows, 2}), excess({rows});
  const auto solve = [&](const auto* data) {
    using T = std::decay_t<decltype(*data)>;
    const nb::gil_scoped_release release;
    solve_rows(data, rows, n, x.stride(0), scheme, static_cast<T>(clamp), tolerance, threads, scales.memory.get(),
               excess.memory.get());
  };
  if (is_float) {
    solve(static_cast<const float*>(x.data()));
  } else {
    solve(static_cast<const double*>(x.data()));
  }
  return nb::make_tuple(scales.release(), excess.release());
}

}  // namespace

void bind_solve(nb::module_& m) {
  m.def("solve_rows", &solve_rows_py, "x"_a.none(), "scheme"_a, "threads"_a = 1, "tolerance"_a = 1e-12,
        "clamp"_a = std::numeric_limits<double>::infinity(),
        "Scales of least squared error, [rows, n] -> [rows, 2], and [rows] a bound on what they leave to gain:\n"
        "(squared error - least squared error) / ‖x‖². It is at most the tolerance.\n"
        "x is clipped to [-clamp, clamp] as it is read.");
}

}  // namespace foldbit
