// The kind of the elementwise losses, and of sums.
#pragma once
#include "kernel_table.h"

namespace fastops {

// An elementwise loss of (x, t), or of (x, t, w) where `params` declares a tensor w, and its
// reduction.
struct LossArgs {
  c10::ScalarType dtype;
  int64_t n;
  void* out;          // n of dtype; for `total` one real
  const void* in[3];  // x, t, w; `total` of the row "sum" takes one input of reals
  int64_t period;     // of w: element i is beside w[i % period]
  const void*
      grad;  // d0, d1, second: of dtype, n values, or one where grad_is_scalar; or null for 1
  bool grad_is_scalar;
  double scale;   // total: multiplies the sum; d0, d1, second: multiplies the gradient
  int to_target;  // second: 0 for the derivative to x twice, 1 for that to x and t, 2 to t twice
  const void* divisor;  // one real in device memory that divides the sum in `total`, or null
  const double* params;
  void* workspace;    // total: loss_workspace(n) bytes
  void* slope;        // values, total, of a kernel that saves its slope: gets d0; or null
  unsigned* outside;  // values, total, on CPU: bit 0 is set where an element of x is not within
                      // [low, high] of the kernel (a NaN is not), bit 1 where one of t is not; or
                      // null
  void* stream;
};
using LossLauncher = Error (*)(const LossArgs&);
struct LossKernel {
  const char* name;
  const char* params;
  LossLauncher values;  // out[i] = value(x, t)
  LossLauncher total;  // out = scale sum(value(x, t)) / divisor; the order of summation is fixed by
                       // n and period alone
  LossLauncher d0, d1;       // out[i] = scale grad d value / dx, and to t
  LossLauncher second;       // out[i] = scale grad d2 value / dx dx, dx dt or dt dt, by `to_target`
  double low, high;          // an element of x or t outside of these gives a NaN
  bool saves_slope = false;  // d0 = -d1 is saved for backward; its own derivative is 0
};
// Sums are taken in chunks whose order n alone decides, so that they have the same bits on every
// device of a kind. A GPU has smaller ones, and so work for each of its multiprocessors.
constexpr int64_t kLossChunk = 16384, kDeviceLossChunk = 4096;
constexpr int64_t loss_workspace(int64_t n) {
  return ((n + kDeviceLossChunk - 1) / kDeviceLossChunk) * 8;
}

}  // namespace fastops
