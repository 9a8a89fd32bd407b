// What the parts of the Python module foldbit._native share: checks of what they are given, and new arrays.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace foldbit {

namespace nb = nanobind;
using namespace nb::literals;

using Array = nb::ndarray<nb::ro>;
using OptionalArray = std::optional<Array>;
using Pair = std::pair<int64_t, int64_t>;
using Shape = std::vector<int64_t>;

// ---------------------------------------------------------------------------------------------------------
// Checks. Each error says what was given and what was expected.

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string message;
  const auto append = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>)
      message += std::to_string(part);
    else
      message += part;
  };
  (append(parts), ...);
  throw nb::value_error(message.c_str());
}

inline std::string show(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i)
    text += (i ? ", " : "") + (shape[i] < 0 ? "any" : std::to_string(shape[i]));
  return text + "]";
}

inline std::string show(nb::dlpack::dtype type) {
  static const char* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  return (type.code < std::size(kinds) ? kinds[type.code] : "another type of ") + std::to_string(type.bits);
}

template <class Any>
Shape shape_of(const Any& array) {
  Shape shape;
  for (size_t i = 0; i < array.ndim(); ++i) shape.push_back(static_cast<int64_t>(array.shape(i)));
  return shape;
}

// Type and shape, as in float32 [2, 3].
template <class Any>
std::string describe(const Any& array) {
  return show(array.dtype()) + " " + show(shape_of(array));
}

// A CPU array of T with this shape; -1 is any size.
template <class T, class Any>
void require_array(const char* name, const Any& array, const char* axes, const Shape& expected) {
  const Shape shape = shape_of(array);
  bool fits = array.dtype() == nb::dtype<T>() && array.device_type() == nb::device::cpu::value &&
              shape.size() == expected.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = expected[i] < 0 || shape[i] == expected[i];
  require(fits, name, " must be a ", show(nb::dtype<T>()), " CPU array [", axes, "] of shape ",
          show(expected), ", got ", describe(array));
}

template <class T, class Any>
T* dense(const char* name, const Any& array, const char* axes, const Shape& expected) {
  require_array<std::remove_const_t<T>>(name, array, axes, expected);
  int64_t stride = 1;
  for (size_t i = array.ndim(); i-- > 0; stride *= static_cast<int64_t>(array.shape(i)))
    require(array.size() == 0 || array.shape(i) == 1 || array.stride(i) == stride, name,
            " must be C-contiguous in memory as [", axes, "]; copy it first (numpy.ascontiguousarray)");
  return static_cast<T*>(const_cast<void*>(static_cast<const void*>(array.data())));
}

inline void require_pair(const char* name, const Pair& pair, int64_t least) {
  require(std::min(pair.first, pair.second) >= least && std::max(pair.first, pair.second) <= INT32_MAX, name,
          " must be two integers of at least ", least, ", got (", pair.first, ", ", pair.second, ")");
}

inline int64_t dim(const Array& array, size_t i) { return static_cast<int64_t>(array.shape(i)); }

// ---------------------------------------------------------------------------------------------------------
// Results

// A new NumPy array, not yet filled.
template <class T>
struct NewArray {
  explicit NewArray(const Shape& shape) {
    size_t size = 1;
    for (const int64_t extent : shape) {
      if (extent && size > PTRDIFF_MAX / sizeof(T) / static_cast<size_t>(extent)) throw std::bad_alloc();
      size *= static_cast<size_t>(extent);
      extents.push_back(static_cast<size_t>(extent));
    }
    memory.reset(new T[size]);
  }

  nb::object release() {
    T* data = memory.release();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T>(data, extents.size(), extents.data(), owner));
  }

  std::unique_ptr<T[]> memory;
  std::vector<size_t> extents;
};

}  // namespace foldbit
