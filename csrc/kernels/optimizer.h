// The optimizer kind: one step over a list of tensors.
#pragma once
#include "kernel_table.h"

namespace fastops {

// One optimizer step over a list of tensors, each a flat run of n elements. `scalars` are the
// kernel's scalars per tensor (see formulas/optimizers.h), as doubles.
constexpr int kMaxStates = 4;
constexpr int kMaxScalarStates = 3;
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
// Options and scalar states in device memory, from which the device makes the scalars of a step. On
// CUDA only.
constexpr int kMaxOptions = 12;
struct OptimizerOnDevice {
  double options[kMaxOptions];
  const double* option_at[kMaxOptions];  // one double that stands for options[k], or null
  unsigned in_double;                    // bit k: scalar state k is a double, not a float
  // Scalar state k of each tensor, which is written; the first is counted up. Unused where the
  // kernel has fewer.
  void* const* scalar_states[kMaxScalarStates];
  const bool* first;  // per tensor
  void* scalars;      // a workspace of kScalarsBytes per tensor
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
// How many words a list of them has: "a, b, c" with ',' between, or "a b c" with ' '.
constexpr int count_words(const char* words, char between) {
  if (!*words) return 0;
  int n = 1;
  for (; *words; ++words) n += *words == between;
  return n;
}
using OptimizerLauncher = Error (*)(const OptimizerArgs&);
// Writes the scalars of a step; `first` where the states have just been made. scalar_states[0] is
// the count of this step (1, 2, ...), the others are written anew; `in_double` is as in
// OptimizerOnDevice.
using ScalarsForStep = void (*)(const double* options, bool first, double* scalar_states,
                                unsigned in_double, double* scalars);
struct OptimizerKernel {
  const char* name;
  int states, scalar_states, scalars;
  OptimizerLauncher step;
  const char* options;             // "float lr, float beta1, bool maximize=False": what
                                   // scalars_for_step() takes, in this order
  const char* state_names;         // "exp_avg exp_avg_sq": the keys of the states, in order
  const char* scalar_state_names;  // "step mu_product": the keys of the numbers beside them, of
                                   // which the first is the step count; "" where none is kept
  ScalarsForStep scalars_for_step;
};

// How many scalars a step of a formula takes.
template <class Op>
constexpr int scalars_of = sizeof(typename Op::template StepScalars<double>) / sizeof(double);

// The table's entry for a formula, from what the formula declares and a back end's functions for
// it.
template <class Op>
consteval OptimizerKernel optimizer_kernel(OptimizerLauncher step, ScalarsForStep scalars) {
  static_assert(Op::states <= kMaxStates && scalars_of<Op> <= kMaxScalars);
  static_assert(Op::states == count_words(Op::state_names, ' '));
  static_assert(count_words(Op::options, ',') <= kMaxOptions);
  static_assert(count_words(Op::scalar_state_names, ' ') <= kMaxScalarStates);
  return {Op::name,
          Op::states,
          count_words(Op::scalar_state_names, ' '),
          scalars_of<Op>,
          step,
          Op::options,
          Op::state_names,
          Op::scalar_state_names,
          scalars};
}

}  // namespace fastops
