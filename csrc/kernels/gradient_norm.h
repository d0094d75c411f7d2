// The global norm of the gradients, and the factor that clips it.
#pragma once
#include "kernel_table.h"

namespace fastops {

struct GradientTensor {
  int64_t n;
  const void* g;
};
struct GradientNormArgs {
  c10::ScalarType dtype;
  int64_t count;
  const GradientTensor* tensors;
  void* stream;
};
// The norm of all gradients together, in two kernels. The first writes the sum of g^2 of every
// kGradientNormChunk elements of every tensor, in order; the second adds those up, in an order that
// is fixed by their number.
constexpr int64_t kGradientNormChunk = 16384;
constexpr int64_t gradient_norm_chunks(int64_t n) {
  return (n + kGradientNormChunk - 1) / kGradientNormChunk;
}
using SumsOfSquares = Error (*)(const GradientNormArgs&, double* sums);
struct ClipArgs {
  int64_t count;
  const double* sums;
  const float* grad_scale;  // in device memory: the gradients are divided by it; or null
  double max_norm;
  float* norm;     // of the gradients after they are divided by grad_scale
  float* divisor;  // what they are to be divided by, grad_scale included, for their norm to be at
                   // most max_norm
  void* stream;
};
using ClipLauncher = Error (*)(const ClipArgs&);
struct GradientNormKernel {
  SumsOfSquares sums;
  ClipLauncher clip;
};

}  // namespace fastops
