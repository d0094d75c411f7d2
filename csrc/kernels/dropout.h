// The dropout kind: elementwise operations with a mask of random numbers.
#pragma once
#include "column_sums.h"
#include "kernel_table.h"

namespace fastops {

// The tensor's elements in memory order, with where each stands in logical (row-major)
// order: dimension 0 is the outermost in memory, and logical index = sum(coordinate[d] *
// logical_stride[d]). A contiguous tensor has dims = 1.
constexpr int kMaxDims = 8;
struct LogicalOrder {
  int dims;
  int64_t size[kMaxDims], logical_stride[kMaxDims];
};
struct DropoutArgs {
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
using DropoutLauncher = Error (*)(const DropoutArgs&);
struct DropoutKernel {
  const char* name;
  int inputs;
  DropoutLauncher forward;
  DropoutLauncher backward;  // (y, dy) -> dx without the mask, where the output tells it; else null
  DropoutLauncher
      summed;  // forward and the sums of the output, of what is its own derivative; else null
};

}  // namespace fastops
