// How every kind hands out its kernels: a constant table, and an error.
#pragma once
#include <c10/core/ScalarType.h>

#include <cstddef>
#include <cstdint>

namespace fastops {

using Error = const char*;  // null, or what went wrong (a CUDA error string); static storage

template <class Kernel>
struct KernelTable {
  const Kernel* data;
  size_t size;
  constexpr const Kernel* begin() const { return data; }
  constexpr const Kernel* end() const { return data + size; }
};

// In the headers of the kinds, `real` is what a dtype is computed in: double for Double, float for
// Float, Half and BFloat16. `params` points to the values of the kernel's parameters, in the order
// in which its formula declares them. `stream` is a cudaStream_t; null on the CPU.

}  // namespace fastops
