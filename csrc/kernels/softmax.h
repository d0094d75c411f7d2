// The softmax kind: a dense tensor seen as (outer, n, inner), normalized over the middle dimension.
#pragma once
#include "kernel_table.h"

namespace fastops {

// A dense tensor seen as (outer, n, inner), the middle one being the dimension that is
// normalised.
struct SoftmaxArgs {
  c10::ScalarType dtype;
  int64_t outer, n, inner;
  void* out;
  const void* in[2];  // forward: x; backward: y, dy
  void* stream;
};
using SoftmaxLauncher = Error (*)(const SoftmaxArgs&);
struct SoftmaxKernel {
  const char* name;
  SoftmaxLauncher forward, backward;
  bool is_log;  // whether the result is the logarithm of the distribution
};

}  // namespace fastops
