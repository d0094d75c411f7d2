// How every kernel is started: grid sizes, dtypes, parameters of formulas, and errors in the seam's
// convention. No kernel.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../kernels/kernel_table.h"
#include "../math.h"

namespace fastops::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
// The blocks per multiprocessor that kernels ask for in their launch bounds. Without the 1,
// ptxas 13.0 spills a few registers here and there to gain a step of occupancy.
constexpr int kResident = 1;

// ------------------------------------------------------------------------------------------------
// launches

// Starts kernel(arguments...). A launch that CUDA refuses is reported here, and not left for the
// next caller to find.
template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
             Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error == cudaSuccess) return nullptr;
  static_cast<void>(cudaGetLastError());
  return cudaGetErrorString(error);
}

// Blocks for a grid-stride loop over `items`, one to a thread at a time: what the device holds,
// four times over so that an uneven last wave costs little, and no more.
inline int64_t grid_for(int64_t items, int threads) {
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t resident = int64_t{std::max(multiprocessors, 1)} * (2048 / threads);
  return std::clamp<int64_t>((items + threads - 1) / threads, 1, 4 * resident);
}

// a / b of what is not negative. The 64-bit division is some hundred instructions.
__host__ __device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// ------------------------------------------------------------------------------------------------
// dtypes

template <class F>
Error dispatch(c10::ScalarType dtype, F f) {
  switch (dtype) {
    case c10::ScalarType::Float:
      return f(float{});
    case c10::ScalarType::Double:
      return f(double{});
    case c10::ScalarType::Half:
      return f(c10::Half{});
    case c10::ScalarType::BFloat16:
      return f(c10::BFloat16{});
    default:
      return "unsupported dtype";
  }
}

// ------------------------------------------------------------------------------------------------
// formulas

// The parameters of a formula as a kernel takes them.
template <int n, class real>
struct Params {
  real value[n > 0 ? n : 1];
  explicit Params(const double* p) : value{} {
    for (int k = 0; k < n; ++k) value[k] = static_cast<real>(p[k]);
  }
};

// F::apply(inputs..., parameters...)
template <class F, class real, int n, size_t... I, class... In>
FASTOPS_FN auto apply(const Params<n, real>& params, std::index_sequence<I...>, In... in) {
  return F::apply(in..., params.value[I]...);
}
template <class F, class real, int n, class... In>
FASTOPS_FN auto apply(const Params<n, real>& params, In... in) {
  return apply<F>(params, std::make_index_sequence<n>{}, in...);
}

// A table of kernels from a list of formulas, by `Make<Formula>::kernel`.
template <class Kernel, template <class> class Make, class L>
struct Table;
template <class Kernel, template <class> class Make, class... Ops>
struct Table<Kernel, Make, List<Ops...>> {
  static constexpr Kernel kernels[] = {Make<Ops>::kernel...};
};

}  // namespace fastops::cuda
