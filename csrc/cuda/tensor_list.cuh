// Kernels over a list of tensors: the list is among the kernel's parameters, and each block works
// on a chunk of one of them.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

namespace fastops::cuda {

#if defined(FASTOPS_EMULATION) || CUDART_VERSION >= 12010
constexpr size_t kParameterBytes = 32764;  // sm_70 and newer, since CUDA 12.1
#else
constexpr size_t kParameterBytes = 4096;
#endif

// The tensor that `block` works on, of those whose first blocks are `first`: the last t of `count`
// with first[t] <= block.
__device__ __forceinline__ int tensor_of_block(const int* first, int count, int block) {
  int tensor = 0;
  for (int above = count; above - tensor > 1;) {
    const int middle = (tensor + above) / 2;
    (first[middle] <= block ? tensor : above) = middle;
  }
  return tensor;
}

}  // namespace fastops::cuda
