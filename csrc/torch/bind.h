// What module.cpp calls: each kind adds its functions to the extension module.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace fastops {
void bind_map(pybind11::module_& m);
void bind_fused(pybind11::module_& m);
void bind_reduce(pybind11::module_& m);
void bind_rows(pybind11::module_& m);
void bind_random(pybind11::module_& m);
void bind_step(pybind11::module_& m);
}  // namespace fastops
