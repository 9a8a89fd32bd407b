// The Python module foldbit._native: its parts, and the choice of an instruction set.

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "foldbit.h"
#include "python_arrays.h"

namespace foldbit {

void bind_conv(nb::module_& m);   // python_conv.cpp
void bind_rows(nb::module_& m);   // python_rows.cpp
void bind_solve(nb::module_& m);  // python_solve.cpp

namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable_kernels()) names.push_back(kernels->name);
  return names;
}

void force_isa(const std::string& name) {
  if (force_kernels(name.c_str())) return;
  std::string names;
  for (const std::string& runnable : isas()) names += (names.empty() ? "" : ", ") + runnable;
  require(false, "this machine cannot run the instruction set '", name, "'; it can run ", names);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The compiled core of foldbit; foldbit.kernels.native is its public face.";
  bind_conv(m);
  bind_rows(m);
  bind_solve(m);
  m.def("isas", &isas, "Names of the instruction sets this machine can run, the best last.");
  m.def("current_isa", [] { return std::string(current_kernels().name); });
  m.def("force_isa", &force_isa, "name"_a);
}

}  // namespace foldbit
