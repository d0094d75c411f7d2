// Stands in for CUDA's header of this name when g++ compiles csrc/cuda for the emulator: the part
// of the language and of the runtime that the kernels use, and no more. See README.md for what it
// models.
#pragma once
#if !defined(FASTOPS_EMULATION)
#error "csrc/emulation is for builds with -DFASTOPS_EMULATION only"
#endif
#include <cmath>
#include <tuple>
#include <type_traits>
#include <utility>

#include "block.h"
#include "memory.h"

// ------------------------------------------------------------------------------------------------
// language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__ \
  &  // `const T __grid_constant__ t`: the parameter itself rather than a copy per thread

#define threadIdx (::fastops::emulation::machine.current->index)
inline const uint3& blockIdx = ::fastops::emulation::machine.block_index;
inline const dim3& blockDim = ::fastops::emulation::machine.block;
inline const dim3& gridDim = ::fastops::emulation::machine.grid;

// `__shared__ T name[n]` cannot be given its meaning by a macro of that name; csrc/cuda/pack.cuh
// calls this one.
#define FASTOPS_EMULATED_SHARED(T, name, n) \
  static char name##_key;                   \
  T(&name)[n] = *static_cast<T(*)[n]>(::fastops::emulation::shared(&name##_key, sizeof(T) * (n)))

#define FASTOPS_EMULATION_TEXT_(x) #x
#define FASTOPS_EMULATION_TEXT(x) FASTOPS_EMULATION_TEXT_(x)
#define FASTOPS_EMULATION_SITE __FILE__ ":" FASTOPS_EMULATION_TEXT(__LINE__)
#define FASTOPS_EMULATION_BARRIER(op, predicate)                                       \
  ::fastops::emulation::barrier(::fastops::emulation::BarrierOp::op, (predicate) != 0, \
                                FASTOPS_EMULATION_SITE)
#define __syncthreads() static_cast<void>(FASTOPS_EMULATION_BARRIER(kPlain, 0))
#define __syncthreads_or(predicate) FASTOPS_EMULATION_BARRIER(kOr, predicate)
#define __syncthreads_and(predicate) FASTOPS_EMULATION_BARRIER(kAnd, predicate)
#define __syncthreads_count(predicate) FASTOPS_EMULATION_BARRIER(kCount, predicate)

namespace fastops::emulation {

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp(WarpOp::kShuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int lane() { return static_cast<int>(machine.current->linear & 31); }

// old = *p; *p = f(old), as one access, ordered with nothing else.
template <class T, class F>
T exchange(T* p, F f) {
  T old, desired;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do desired = f(old);
  while (!__atomic_compare_exchange(p, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace fastops::emulation

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  ::fastops::emulation::warp(::fastops::emulation::WarpOp::kSync, mask, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(
      ::fastops::emulation::warp(::fastops::emulation::WarpOp::kBallot, mask, predicate != 0, 0));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = ::fastops::emulation::lane();
  return ::fastops::emulation::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = ::fastops::emulation::lane(), source = lane ^ lanes;
  const bool beyond = (source & ~(width - 1)) > (lane & ~(width - 1));
  return ::fastops::emulation::shuffle(mask, value, beyond ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = ::fastops::emulation::lane(), source = lane + static_cast<int>(delta);
  return ::fastops::emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = ::fastops::emulation::lane(), source = lane - static_cast<int>(delta);
  return ::fastops::emulation::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source);
}

template <class T>
void __stwb(T* p, T value) {
  *p = value;
}

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return ::fastops::emulation::exchange(p, [=](T old) { return old + value; });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return ::fastops::emulation::exchange(p, [=](T old) { return old > value ? old : value; });
}

// ------------------------------------------------------------------------------------------------
// runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

namespace fastops::emulation {
inline cudaError_t last_error = cudaSuccess;
}

// Runs the kernel to its end. As on a device, a kernel that faults leaves its error for
// cudaGetLastError.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  namespace emulation = ::fastops::emulation;
  const std::lock_guard lock(emulation::machine.mutex);
  using Copies = std::tuple<std::decay_t<Parameters>...>;
  const char* refusal = emulation::refuse(config->gridDim, config->blockDim,
                                          config->dynamicSmemBytes, sizeof(Copies));
  if (refusal) {
    std::snprintf(emulation::machine.error, sizeof emulation::machine.error,
                  "bad launch configuration: %s", refusal);
    return emulation::last_error = cudaErrorInvalidConfiguration;
  }
  ++emulation::counters.launches;
  struct Call {
    void (*kernel)(Parameters...);
    Copies copies;
  } call{kernel, Copies(std::forward<Arguments>(arguments)...)};
  const auto body = [](void* argument) {
    Call& c = *static_cast<Call*>(argument);
    std::apply(c.kernel, c.copies);
  };
  if (emulation::launched)
    emulation::launched->push_back({emulation::current_device(), config->stream});
  if (emulation::graph) {
    emulation::graph->work.push_back([config = *config, body, call]() mutable {
      const std::lock_guard lock(emulation::machine.mutex);
      return emulation::run_grid(config.gridDim, config.blockDim, config.dynamicSmemBytes, body,
                                 &call);
    });
    return cudaSuccess;
  }
  const bool ran =
      emulation::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes, body, &call);
  return ran ? cudaSuccess : emulation::last_error = cudaErrorLaunchFailure;
}

inline cudaError_t cudaPeekAtLastError() { return ::fastops::emulation::last_error; }
inline cudaError_t cudaGetLastError() {
  return ::std::exchange(::fastops::emulation::last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : ::fastops::emulation::machine.error;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = ::fastops::emulation::current_device();
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = ::fastops::emulation::multiprocessors;
  return cudaSuccess;
}
