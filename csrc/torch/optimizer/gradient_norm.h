// The norm of many gradients together, and what clips it.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../../kernels/gradient_norm.h"

namespace fastops {

// Memory is kept between uses.
class GradientNorm {
 public:
  void clear();
  void add(c10::ScalarType dtype, int64_t n, const void* data);

  // The norm of what was added, divided by grad_scale, and what the gradients are to be divided by
  // for it to be at most max_norm, grad_scale included: two float32 on `device`, where the
  // gradients are, which is not waited for. `release_interpreter` while the kernels run.
  at::Tensor clip(c10::Device device, const std::optional<at::Tensor>& grad_scale, double max_norm,
                  bool release_interpreter);

 private:
  struct Bucket {
    c10::ScalarType dtype;
    std::vector<GradientTensor> tensors;
  };
  std::vector<Bucket> buckets_;
  int64_t chunks_ = 0;
  std::vector<double> sums_;
};

}  // namespace fastops
