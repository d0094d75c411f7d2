// What GPUs do in one instruction and math.h says in several. No memory, no formula.
#pragma once
#include <cuda_runtime.h>

#include "../math.h"

namespace fastops::cuda {

// exp(x) of what is not positive: a multiplication and the one instruction that GPUs have, some
// |x| half-units in the last place from the exact result.
__device__ __forceinline__ float exp_below(float x) {
  const float y = x * 1.44269504f;
#if defined(FASTOPS_EMULATION)
  return ::exp2f(y);
#else
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y));
  return e;
#endif
}
__device__ __forceinline__ double exp_below(double x) { return ::exp(x); }

// The larger, or NaN where there is one: one instruction, of floats or of two halves.
__device__ __forceinline__ float maximum(float a, float b) {
#if defined(FASTOPS_EMULATION)
  return max(a, b);
#else
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
#endif
}
__device__ __forceinline__ double maximum(double a, double b) { return max(a, b); }

}  // namespace fastops::cuda
