// The three reductions of a loss, numbered as torch scalars them, and the deterministic sum behind
// two of them.
#pragma once
#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

namespace fastops {

inline void check_reduction(const char* op, int64_t reduction) {
  TORCH_CHECK_VALUE(reduction >= 0 && reduction < at::Reduction::END, op, ": reduction ", reduction,
                    " is none of 0 (none), 1 (mean), 2 (sum)");
}

// sum(values) * scale / divisor as a 0-d tensor; values are dense and of a real dtype, divisor is
// 0-d or undefined.
at::Tensor sum_of(const at::Tensor& values, double scale, const at::Tensor& divisor);

}  // namespace fastops
