// The cross-entropy kind: rows of logits against class indices or distributions.
#pragma once
#include "kernel_table.h"

namespace fastops {

// Rows of logits against class indices, or against a distribution each. Row r = (o, i) of outer x
// inner has loss[r] and target[r], or probability[.] laid out like x. Where there is a second
// target, the row's loss is lam times that of the first and (1 - lam) times that of the second;
// each is then divided by a divisor of its own.
struct CrossEntropyArgs {
  c10::ScalarType dtype;
  int64_t outer, n, inner;
  const void* x;
  const int64_t* target;         // null where `probability` is given
  const int64_t* second_target;  // or null
  double lam;
  const void* probability;           // of dtype, or null
  bool probability_is_real = false;  // or of reals; on CPU alone
  const void* weight;                // n reals, or null
  int64_t ignore_index;              // of `target`
  double label_smoothing;
  double z_loss;  // this times log(sum(exp(x)))^2 is added to a row's loss, unless 0
  void* loss;     // outer * inner reals; 0 where ignored
  void* lse;      // log(sum(exp(x))), as `loss` is laid out, or null
  void* grad;     // d loss[r] / dx * scale / divisor, of dtype, laid out like x, or null. May be x
                  // itself
  double scale;
  const void* divisor;         // one real in device memory, or null for 1
  const void* second_divisor;  // of the second target; with that, both divide the loss as well as
                               // the gradient
  void* stream;
};
using CrossEntropyLauncher = Error (*)(const CrossEntropyArgs&);
// A saved gradient that is handed on: n values of dtype, multiplied where they lie by one in device
// memory, of dtype or a real.
struct RescaleArgs {
  c10::ScalarType dtype;
  int64_t n;
  void* grad;
  const void* factor;
  bool factor_is_real;
  void* stream;
};
struct CrossEntropyKernel {
  const char* name;
  CrossEntropyLauncher forward;  // loss, and the gradient in the same visit where `grad` is given
  CrossEntropyLauncher forward_probability;  // the same, with `probability` for `target`
  // Writes sum(weight[target[r]]) over the rows not ignored (a count where weight is null) to
  // `divisor_out`, one real. `loss` may be written to on the way. On CPU the target is also
  // checked: returns the first row out of range in *bad_row, else -1; CUDA asserts on device.
  Error (*divisor)(const CrossEntropyArgs&, void* divisor_out, int64_t* bad_row);
  // Multiplies a gradient by the factor, and moves nothing where that is 1: the host need not wait
  // to see it. Null on CPU, where it does not.
  Error (*rescale)(const RescaleArgs&) = nullptr;
};

}  // namespace fastops
