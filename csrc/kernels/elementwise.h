// The elementwise kind: activations, activations fused with the addition before them, and gates.
#pragma once
#include "column_sums.h"
#include "kernel_table.h"

namespace fastops {

// out[i] = f(in[0][i], ...), elementwise over n values of one dtype in one memory order. out
// may be in[0].
struct ElementwiseArgs {
  c10::ScalarType dtype;
  int64_t n;
  void* out;
  const void* in[3];
  const double* params;
  void* stream;  // a cudaStream_t; null on CPU
};
using ElementwiseLauncher = Error (*)(const ElementwiseArgs&);
struct ElementwiseKernel {
  const char* name;              // "gelu_tanh"
  const char* params;            // "float alpha=1.0", or ""
  bool from_output;              // what backward takes as s: the output rather than the input
  ElementwiseLauncher forward;   // (x) -> y
  ElementwiseLauncher backward;  // (s, dy) -> dx = dy f'
  ElementwiseLauncher second;    // (s, dy, ddx) -> ddx d(backward)/ds
  // Whether s may be the output where it should be the input; or null.
  bool (*output_will_do)(const double* params) = nullptr;
};

// out[i] = f(in[0][i], in[1][i % period]), and backward with in[2][i] for the upstream
// gradient. `broadcast` rows have periods of less than n. out may be in[0].
struct FusedArgs {
  c10::ScalarType dtype;
  int64_t n, period;
  void* out;
  const void* in[3];
  void* sums;  // summed: of n / period rows, kRowBlock of them at a time, what dx adds up to:
               // period reals for each block of rows
  void* stream;
};
using FusedLauncher = Error (*)(const FusedArgs&);
struct FusedKernel {
  const char* name;        // "bias_gelu"
  const char* activation;  // the map row that it is, of the sum of its inputs
  bool broadcast;
  FusedLauncher forward;
  FusedLauncher
      backward;  // (x, t, dy) -> dx; null where the activation's own, of the output, will do
  FusedLauncher summed;  // backward and the sums of dx; null where t is not one row
};

// A gate: y = f(a, b). Every tensor is `outer` rows of `inner` elements, which may be further apart
// than they are long, as the halves of one tensor are.
struct GateOperand {
  void* data;      // in[]: is not written
  int64_t stride;  // elements from the beginning of a row to that of the next
};
struct GateArgs {
  c10::ScalarType dtype;
  int64_t outer, inner;
  GateOperand out[2], in[5];  // no output overlaps an input
  void* stream;
};
using GateLauncher = Error (*)(const GateArgs&);
struct GateKernel {
  const char* name;       // "glu"
  GateLauncher forward;   // (a, b) -> y
  GateLauncher backward;  // (a, b, dy) -> dy f_a, dy f_b
  GateLauncher tangent;   // (a, b, u, v) -> u f_a + v f_b
  GateLauncher second;    // (a, b, dy, u, v) -> the derivatives to a and to b of dy times that
};

}  // namespace fastops
