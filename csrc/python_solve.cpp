// The solvers' part of the Python module foldbit._native.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "solve.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace foldbit {
namespace {

std::string describe(const nb::ndarray<nb::ro>& x) {
  static const char* const dlpack_kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  const nb::dlpack::dtype type = x.dtype();
  const char* const kind = type.code < std::size(dlpack_kinds) ? dlpack_kinds[type.code] : "another type of ";
  std::string text = kind + std::to_string(type.bits) + " [";
  for (size_t i = 0; i < x.ndim(); ++i) text += (i ? ", " : "") + std::to_string(x.shape(i));
  return text + "]";
}

// A new NumPy array that takes over the data.
nb::object as_numpy(std::unique_ptr<double[]> data, std::initializer_list<size_t> shape) {
  nb::capsule owner(data.get(), [](void* p) noexcept { delete[] static_cast<double*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, double>(data.release(), shape, owner));
}

nb::tuple solve_rows_py(nb::handle given, const std::string& scheme_name, int threads, double tolerance,
                         double clamp) {
  nb::ndarray<nb::ro> x;
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
  if (x.ndim() != 2) {
    throw nb::value_error(("x must have two dimensions, [rows, n], got " + describe(x)).c_str());
  }
  const size_t rows = x.shape(0), n = x.shape(1);
  if (n == 0) throw nb::value_error(("x must have at least one element a row, got " + describe(x)).c_str());
  if (rows > 0 && n > 1 && x.stride(1) != 1) {
    throw nb::value_error(("the elements of a row of x must lie side by side in memory, got stride " +
                           std::to_string(x.stride(1)) + "; copy it first (numpy.ascontiguousarray)")
                              .c_str());
  }
  if (scheme_name != "ls-2" && scheme_name != "ls-T") {
    throw nb::value_error(("scheme must be 'ls-2' or 'ls-T', got '" + scheme_name + "'").c_str());
  }
  if (threads < 1) throw nb::value_error(("threads must be at least 1, got " + std::to_string(threads)).c_str());
  if (!(tolerance >= 0)) {
    throw nb::value_error(("tolerance must be at least 0, got " + std::to_string(tolerance)).c_str());
  }

  if (!(clamp > 0)) throw nb::value_error(("clamp must be positive, got " + std::to_string(clamp)).c_str());

  const SolveScheme scheme = scheme_name == "ls-2" ? SolveScheme::two_planes : SolveScheme::ternary;
  std::unique_ptr<double[]> scales(new double[2 * rows]), excess(new double[rows]);
  const auto solve = [&](const auto* data) {
    using T = std::decay_t<decltype(*data)>;
    const nb::gil_scoped_release release;
    solve_rows(data, static_cast<int64_t>(rows), static_cast<int64_t>(n), x.stride(0), scheme, static_cast<T>(clamp),
               tolerance, threads, scales.get(), excess.get());
  };
  if (is_float) {
    solve(static_cast<const float*>(x.data()));
  } else {
    solve(static_cast<const double*>(x.data()));
  }
  return nb::make_tuple(as_numpy(std::move(scales), {rows, 2}), as_numpy(std::move(excess), {rows}));
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
