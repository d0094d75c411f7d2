// The optimizer kind: one step over a list of tensors.
#pragma once
#include "kernel_table.h"

namespace fastops {

// One optimizer step over a list of tensors, each a flat run of n elements. `scalars` are the
// row's scalars per tensor (see formulas/optimizers.h), as doubles.
constexpr int kMaxStates = 4;
constexpr int kMaxScalars = 16;
struct OptimizerTensor {
  int64_t n;
  void* p;
  const void* g;
  void* s[kMaxStates];
  const double* scalars;
  void* average;  // n reals, the running average of p, or null
  double weight;  // average = lerp(average, new p, weight)
};
struct OptimizerNoise {  // what the rounding of one tensor draws from; see Noise in
                         // formulas/philox.h
  int64_t seed;
  uint32_t step, number;
};
// Options and step counts in device memory, from which the device makes the scalars of a step. On
// CUDA only.
constexpr int kMaxOptions = 12;
struct OptimizerOnDevice {
  double options[kMaxOptions];
  const double* option_at[kMaxOptions];  // one double that stands for options[k], or null
  bool counts_in_double;
  void* const* counts;  // per tensor: one float or double, which is counted up; null where the row
                        // does not count
  const bool* first;    // per tensor
  void* scalars;        // a workspace of kScalarsBytes per tensor
};
constexpr int64_t kScalarsBytes = (kMaxScalars + 4) * 8;
struct OptimizerArgs {
  c10::ScalarType dtype;        // of p and g
  c10::ScalarType state_dtype;  // of s
  int64_t count;
  const OptimizerTensor* tensors;
  const float* grad_scale;  // in device memory: g is divided by it; or null
  const float*
      found_inf;  // in device memory: a value other than 0 makes the step do nothing; or null
  const OptimizerNoise*
      noise;  // per tensor: all that is stored as bfloat16 is rounded stochastically; or null
  const OptimizerOnDevice* on_device;  // or null
  void* stream;
};
constexpr int count_options(const char* options) {
  int n = 1;
  for (; *options; ++options) n += *options == ',';
  return n;
}
using OptimizerLauncher = Error (*)(const OptimizerArgs&);
struct OptimizerKernel {
  const char* name;
  int states, scalars;
  OptimizerLauncher step;
  const char* options = "";      // "float lr, float beta1, bool maximize=False": what
                                 // scalars_for_step() takes, in this order
  const char* state_names = "";  // "exp_avg exp_avg_sq": the keys of the states, in order
  bool counts = false;           // whether the state has a step count beside them
  // Writes the scalars of step `step` (1, 2, ...); `first` where the states have just been made.
  void (*scalars_for_step)(const double* options, double step, bool first,
                           double* scalars) = nullptr;
};

}  // namespace fastops
