// The seam. Above it: torch, schemas, shapes, gradients. Below it: loops over raw memory. A back
// end is a few constant tables of rows, one per kind; nothing above the seam knows a formula,
// nothing below it knows a tensor.
#pragma once
#include <c10/core/ScalarType.h>

#include <cstddef>
#include <cstdint>

namespace fastops {

using Error = const char*;  // null, or what went wrong (a CUDA error string); static storage

template <class Row>
struct Rows {
  const Row* data;
  size_t size;
  constexpr const Row* begin() const { return data; }
  constexpr const Row* end() const { return data + size; }
};

// `real` below is what a dtype is computed in: double for Double, float for Float, Half and
// BFloat16. `params` points to the values of the row's parameters, in the declared order.

// ------------------------------------------------------------------------------------------------
// map out[i] = f(in[0][i], ...), elementwise over n values of one dtype in one memory order. out
// may be in[0].
struct MapArgs {
  c10::ScalarType dtype;
  int64_t n;
  void* out;
  const void* in[3];
  const double* params;
  void* stream;  // a cudaStream_t; null on CPU
};
using MapKernel = Error (*)(const MapArgs&);
struct MapRow {
  const char* name;    // "gelu_tanh"
  const char* params;  // "float alpha=1.0", or ""
  bool from_output;    // what backward takes as s: the output rather than the input
  MapKernel forward;   // (x) -> y
  MapKernel backward;  // (s, dy) -> dx = dy f'
  MapKernel second;    // (s, dy, ddx) -> ddx d(backward)/ds
};

// ------------------------------------------------------------------------------------------------
// fused out[i] = f(in[0][i], in[1][i % period]), and backward with in[2][i] for the upstream
// gradient. `broadcast` rows have periods of less than n. out may be in[0].
struct FusedArgs {
  c10::ScalarType dtype;
  int64_t n, period;
  void* out;
  const void* in[3];
  void* sums;  // summed: of n / period rows, kStrip of them at a time, what dx adds up to: period
               // reals for each strip
  void* stream;
};
using FusedKernel = Error (*)(const FusedArgs&);
struct FusedRow {
  const char* name;        // "bias_gelu"
  const char* activation;  // the map row that it is, of the sum of its inputs
  bool broadcast;
  FusedKernel forward;
  FusedKernel
      backward;        // (x, t, dy) -> dx; null where the activation's own, of the output, will do
  FusedKernel summed;  // backward and the sums of dx; null where t is not one row
};

// Rows whose sum is taken term by term: that of more would drift where they are alike.
constexpr int64_t kStrip = 16;
constexpr int64_t strips_of(int64_t rows) { return (rows + kStrip - 1) / kStrip; }

// ------------------------------------------------------------------------------------------------
// reduce An elementwise loss of (x, t), or of (x, t, w) where `params` declares a tensor w, and its
// reduction.
struct ReduceArgs {
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
  void* workspace;  // total: reduce_workspace(n) bytes
  void* stream;
};
using ReduceKernel = Error (*)(const ReduceArgs&);
struct ReduceRow {
  const char* name;
  const char* params;
  ReduceKernel values;  // out[i] = value(x, t)
  ReduceKernel total;  // out = scale sum(value(x, t)) / divisor; the order of summation is fixed by
                       // n and period alone
  ReduceKernel d0, d1;  // out[i] = scale grad d value / dx, and to t
  ReduceKernel second;  // out[i] = scale grad d2 value / dx dx, dx dt or dt dt, by `to_target`
  double low, high;     // an input outside of these gives a NaN
};
// Sums are taken in chunks of so many elements, chunk by chunk in order, whatever runs them.
constexpr int64_t kReduceChunk = 16384;
constexpr int64_t reduce_workspace(int64_t n) {
  return ((n + kReduceChunk - 1) / kReduceChunk) * 8;
}

// ------------------------------------------------------------------------------------------------
// rows A dense tensor seen as (outer, n, inner), the middle one being the dimension that is
// normalised.
struct SoftmaxArgs {
  c10::ScalarType dtype;
  int64_t outer, n, inner;
  void* out;
  const void* in[2];  // forward: x; backward: y, dy
  void* stream;
};
using SoftmaxKernel = Error (*)(const SoftmaxArgs&);
struct SoftmaxRow {
  const char* name;
  SoftmaxKernel forward, backward;
};

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
  const void* probability;  // of dtype, or null
  const void* weight;       // n reals, or null
  int64_t ignore_index;     // of `target`
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
using CrossEntropyKernel = Error (*)(const CrossEntropyArgs&);
struct CrossEntropyRow {
  const char* name;
  CrossEntropyKernel forward;  // loss, and the gradient in the same visit where `grad` is given
  CrossEntropyKernel forward_probability;  // the same, with `probability` for `target`
  // Writes sum(weight[target[r]]) over the rows not ignored (a count where weight is null) to
  // `divisor_out`, one real. `loss` may be written to on the way. On CPU the target is also
  // checked: returns the first row out of range in *bad_row, else -1; CUDA asserts on device.
  Error (*divisor)(const CrossEntropyArgs&, void* divisor_out, int64_t* bad_row);
};

// ------------------------------------------------------------------------------------------------
// random The tensor's elements in memory order, with where each stands in logical (row-major)
// order: dimension 0 is the outermost in memory, and logical index = sum(coordinate[d] *
// logical_stride[d]). A contiguous tensor has dims = 1.
constexpr int kMaxDims = 8;
struct LogicalOrder {
  int dims;
  int64_t size[kMaxDims], logical_stride[kMaxDims];
};
struct RandomArgs {
  c10::ScalarType dtype;
  int64_t n;
  void* out;
  const void* in[3];
  int64_t period;       // of in[1], where a row has three inputs: in[1][i % period]
  const int64_t* seed;  // in device memory
  uint32_t threshold;   // an element is dropped when its word is below
  double scale;
  LogicalOrder order;
  void* sums;  // summed: as of FusedArgs, of n / period contiguous rows
  void* stream;
};
using RandomKernel = Error (*)(const RandomArgs&);
struct RandomRow {
  const char* name;
  int inputs;
  RandomKernel forward;
  RandomKernel backward;  // (y, dy) -> dx without the mask, where the output tells it; else null
  RandomKernel
      summed;  // forward and the sums of the output, of what is its own derivative; else null
};

// ------------------------------------------------------------------------------------------------
// step One optimizer step over a list of tensors, each a flat run of n elements. `numbers` are the
// row's numbers per tensor (see formulas/optimizers.h), as doubles.
constexpr int kMaxStates = 4;
constexpr int kMaxNumbers = 16;
struct StepTensor {
  int64_t n;
  void* p;
  const void* g;
  void* s[kMaxStates];
  const double* numbers;
  void* average;  // n reals, the running average of p, or null
  double weight;  // average = lerp(average, new p, weight)
};
struct StepNoise {  // what the rounding of one tensor draws from; see Noise in formulas/philox.h
  int64_t seed;
  uint32_t step, number;
};
// Options and step counts in device memory, from which the device makes the numbers of a step. On
// CUDA only.
constexpr int kMaxOptions = 12;
struct StepOnDevice {
  double options[kMaxOptions];
  const double* option_at[kMaxOptions];  // one double that stands for options[k], or null
  bool counts_in_double;
  void* const* counts;  // per tensor: one float or double, which is counted up; null where the row
                        // does not count
  const bool* first;    // per tensor
  void* numbers;        // a workspace of kNumbersBytes per tensor
};
constexpr int64_t kNumbersBytes = (kMaxNumbers + 4) * 8;
struct StepArgs {
  c10::ScalarType dtype;        // of p and g
  c10::ScalarType state_dtype;  // of s
  int64_t count;
  const StepTensor* tensors;
  const float* grad_scale;  // in device memory: g is divided by it; or null
  const float*
      found_inf;  // in device memory: a value other than 0 makes the step do nothing; or null
  const StepNoise*
      noise;  // per tensor: all that is stored as bfloat16 is rounded stochastically; or null
  const StepOnDevice* on_device;  // or null
  void* stream;
};
constexpr int count_options(const char* options) {
  int n = 1;
  for (; *options; ++options) n += *options == ',';
  return n;
}
using StepKernel = Error (*)(const StepArgs&);
struct StepRow {
  const char* name;
  int states, numbers;
  StepKernel step;
  const char* options =
      "";  // "float lr, float beta1, bool maximize=False": what derive() takes, in this order
  const char* state_names = "";  // "exp_avg exp_avg_sq": the keys of the states, in order
  bool counts = false;           // whether the state has a step count beside them
  // Writes the numbers of step `step` (1, 2, ...); `first` where the states have just been made.
  void (*derive)(const double* options, double step, bool first, double* numbers) = nullptr;
};

// The norm of all gradients together, in two kernels. The first writes the sum of g^2 of every
// kNormChunk elements of every tensor, in order; the second adds those up, in an order that is
// fixed by their number.
constexpr int64_t kNormChunk = 16384;
constexpr int64_t norm_chunks(int64_t n) { return (n + kNormChunk - 1) / kNormChunk; }
using SumsOfSquares = Error (*)(const StepArgs&, double* sums);
struct ClipArgs {
  int64_t count;
  const double* sums;
  const float* grad_scale;  // as of StepArgs
  double max_norm;
  float* norm;     // of the gradients after they are divided by grad_scale
  float* divisor;  // what they are to be divided by, grad_scale included, for their norm to be at
                   // most max_norm
  void* stream;
};
using ClipKernel = Error (*)(const ClipArgs&);
struct NormRow {
  SumsOfSquares sums;
  ClipKernel clip;
};

// ------------------------------------------------------------------------------------------------
// back ends
struct Tables {
  Rows<MapRow> map;
  Rows<FusedRow> fused;
  Rows<ReduceRow> reduce;  // the last row is "sum": value(x) = x over reals
  Rows<SoftmaxRow> softmax;
  Rows<CrossEntropyRow> cross_entropy;
  Rows<RandomRow> random;
  Rows<StepRow> step;
  NormRow norm;
};

#define FASTOPS_TABLES(back_end)                                        \
  namespace back_end {                                                  \
  extern const Rows<MapRow> map_rows;                                   \
  extern const Rows<FusedRow> fused_rows;                               \
  extern const Rows<ReduceRow> reduce_rows;                             \
  extern const Rows<SoftmaxRow> softmax_rows;                           \
  extern const Rows<CrossEntropyRow> cross_entropy_rows;                \
  extern const Rows<RandomRow> random_rows;                             \
  extern const Rows<StepRow> step_rows;                                 \
  extern const NormRow norm_row;                                        \
  inline Tables tables() {                                              \
    return {map_rows,           fused_rows,  reduce_rows, softmax_rows, \
            cross_entropy_rows, random_rows, step_rows,   norm_row};    \
  }                                                                     \
  }
FASTOPS_TABLES(DEFAULT)
FASTOPS_TABLES(AVX2)
FASTOPS_TABLES(AVX512)
FASTOPS_TABLES(cuda)
#undef FASTOPS_TABLES

}  // namespace fastops
