// What the parts of the Python face share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "processor.hpp"

namespace lamp {

void require(bool condition, const char* message);

namespace python {

namespace nb = nanobind;
using namespace nb::literals;
using lamp::kernels;
using lamp::require;

template <class T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::device::cpu>;
template <int Dimensions>
using Floats = Array<const float, Dimensions>;

template <class A>
bool row_major(const A& x) {
  if (x.size() == 0) return true;
  std::int64_t stride = 1;
  for (std::size_t d = x.ndim(); d-- > 0; stride *= static_cast<std::int64_t>(x.shape(d)))
    if (x.shape(d) > 1 && x.stride(d) != stride) return false;
  return true;
}

inline std::ptrdiff_t length(std::size_t n) { return static_cast<std::ptrdiff_t>(n); }

void bind_lowbit(nb::module_& m);
void bind_layer(nb::module_& m);
void bind_decode(nb::module_& m);
void bind_constants(nb::module_& m);

}  // namespace python
}  // namespace lamp
