// What module.cpp calls: each kind adds its functions to the extension module.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

namespace fastops {

// Lets other Python threads run while a kernel does, where it takes long enough to be worth the two switches.
class Unlocked {
 public:
  explicit Unlocked(const at::Tensor& t) {
    if (t.defined() && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && t.numel() >= kWorthwhile)
      released_.emplace();
  }

 private:
  static constexpr int64_t kWorthwhile = 1 << 14;
  std::optional<pybind11::gil_scoped_release> released_;
};

void bind_map(pybind11::module_& m);
void bind_fused(pybind11::module_& m);
void bind_reduce(pybind11::module_& m);
void bind_rows(pybind11::module_& m);
void bind_random(pybind11::module_& m);
void bind_step(pybind11::module_& m);
}  // namespace fastops
