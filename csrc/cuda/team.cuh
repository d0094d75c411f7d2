// The threads that work on one row or chunk together, a warp or a whole block, and what they do
// together: sums, maxima, waiting. The order of every sum is fixed. No memory but a little shared,
// no formula.
#pragma once
#include <cuda_runtime.h>

#include "../math.h"
#include "launch.cuh"
#include "pack.cuh"

namespace fastops::cuda {

// All threads of the team must call each member, and get the same result. `threads` is 32 (a warp:
// the block may hold several), or the size of the block.
template <int threads>
struct Team {
  static_assert(threads % kWarp == 0 && threads <= 1024);
  static constexpr int warps = threads / kWarp;

  int rank;  // of this thread in the team
  __device__ __forceinline__ Team() : rank(static_cast<int>(threadIdx.x) % threads) {}

  // What was written before by any thread of the team is seen after by all.
  __device__ __forceinline__ void sync() const {
    if constexpr (warps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  template <class T>
  __device__ __forceinline__ T sum(T value) const {
    return join(value, [](T a, T b) { return a + b; });
  }
  template <class T>
  __device__ __forceinline__ T maximum(T value) const {
    return join(value, [](T a, T b) { return max(a, b); });
  }

  // join(a, b) must be associative and commutative, up to rounding.
  template <class T, class F>
  __device__ __forceinline__ T join(T value, F f) const {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      value = f(value, __shfl_xor_sync(kFullMask, value, distance));
    if constexpr (warps == 1) {
      return value;
    } else {
      FASTOPS_SHARED(T, each, warps);
      __syncthreads();  // before: the last join may still be read
      if (rank % kWarp == 0) each[rank / kWarp] = value;
      __syncthreads();
      value = each[rank % warps];
#pragma unroll
      for (int distance = warps / 2; distance > 0; distance /= 2)
        value = f(value, __shfl_xor_sync(kFullMask, value, distance));
      return value;
    }
  }
};

}  // namespace fastops::cuda
