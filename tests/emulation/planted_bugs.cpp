// Kernels with a bug that can be switched on, to show that the emulator reports it: `planted_bugs
// NAME clean|planted`. Prints what was found and returns 1; prints "nothing found" and returns 0.
// Never part of the library.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/pack.cuh"

namespace fastops {
namespace {

using cuda::kFullMask;
using cuda::load;
using cuda::store;
constexpr int kBlock = 64;

__device__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ float get(const float* in, int n) { return load(in + thread() % n); }
__device__ void put(float* out, int n, float value) {
  if (thread() < n) store(out + thread(), value);
}

// ------------------------------------------------------------------------------------------------
// barriers and races

// out = the block's input in reverse, through shared memory: thread 0 reads what thread 63 wrote.
template <bool planted>
__global__ void missing_syncthreads(float* out, const float* in, int n) {
  FASTOPS_SHARED(float, s, kBlock);
  const int t = thread();
  s[t] = get(in, n);
  if constexpr (!planted) __syncthreads();
  put(out, n, s[kBlock - 1 - t]);
}

// Two rounds through the same array: without the second barrier, a thread may write round two
// before all have read one.
template <bool planted>
__global__ void missing_second_syncthreads(float* out, const float* in, int n) {
  FASTOPS_SHARED(float, s, kBlock);
  const int t = thread();
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    s[t] = get(in, n) + static_cast<float>(round);
    __syncthreads();
    sum += s[kBlock - 1 - t];
    if constexpr (!planted) __syncthreads();
  }
  put(out, n, sum);
}

template <bool planted>
__global__ void missing_syncwarp(float* out, const float* in, int n) {
  FASTOPS_SHARED(float, s, kBlock);
  const int t = thread();
  s[t] = get(in, n);
  if constexpr (!planted) __syncwarp();
  put(out, n, s[t ^ 1]);
}

// __syncwarp where the threads that exchange are of two warps.
template <bool planted>
__global__ void wrong_scope(float* out, const float* in, int n) {
  FASTOPS_SHARED(float, s, kBlock);
  const int t = thread();
  s[t] = get(in, n);
  if constexpr (planted) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  put(out, n, s[kBlock - 1 - t]);
}

// Whoever comes last decides.
template <bool planted>
__global__ void last_writer_wins(float* out, const float* in, int n) {
  const int t = thread();
  put(out, n, get(in, n));
  if (planted ? t % 16 == 0 : t == 0) store(out, load(in) + static_cast<float>(t));
}

// A shuffle makes the lanes meet but does not order what they wrote.
template <bool planted>
__global__ void shuffle_as_barrier(float* out, const float* in, int n) {
  FASTOPS_SHARED(float, s, kBlock);
  const int t = thread();
  s[t] = get(in, n);
  const float mine = __shfl_sync(kFullMask, s[t], t);
  if constexpr (!planted) __syncwarp();
  put(out, n, s[t ^ 1] + mine - mine);
}

// Every block adds to out[0].
template <bool planted>
__global__ void cross_block_race(float* out, const float* in, int) {
  if (threadIdx.x != 0) return;
  if constexpr (planted) {
    out[0] += in[blockIdx.x];
  } else {
    atomicAdd(out, in[blockIdx.x]);
  }
}

template <bool planted>
__global__ void missing_atomic(float* out, const float* in, int) {
  if constexpr (planted) {
    out[0] += in[threadIdx.x % 2];
  } else {
    atomicAdd(out, in[threadIdx.x % 2]);
  }
}

template <bool planted>
__global__ void divergent_barrier(float* out, const float* in, int n) {
  const int t = thread();
  if (planted && t < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  put(out, n, get(in, n));
}

template <bool planted>
__global__ void barrier_after_return(float* out, const float* in, int n) {
  const int t = thread();
  if (planted && t >= n) return;
  __syncthreads();
  put(out, n, get(in, n));
}

// One half of the first warp waits for the whole warp, the other half for the whole block.
template <bool planted>
__global__ void deadlock(float* out, const float* in, int n) {
  const int t = thread();
  if (!planted || t < 16) __syncwarp();
  __syncthreads();
  put(out, n, get(in, n));
}

// ------------------------------------------------------------------------------------------------
// warp operations

template <bool planted>
__global__ void mask_without_caller(float* out, const float* in, int n) {
  put(out, n, __shfl_xor_sync(planted ? 0x0000ffffu : kFullMask, get(in, n), 1));
}

template <bool planted>
__global__ void mask_with_returned_lane(float* out, const float* in, int n) {
  const int t = thread();
  if (planted && t >= 16) return;
  put(out, n, __shfl_xor_sync(kFullMask, get(in, n), 1));
}

template <bool planted>
__global__ void mask_beyond_block(float* out, const float* in, int n) {  // launched with 16 threads
  put(out, n, __shfl_xor_sync(planted ? kFullMask : 0xffffu, get(in, n), 1));
}

template <bool planted>
__global__ void shuffle_from_outside(float* out, const float* in, int n) {
  const int t = thread();
  if (t >= 16) return;
  put(out, n, __shfl_sync(0xffffu, get(in, n), planted ? t + 16 : t));
}

template <bool planted>
__global__ void different_operations(float* out, const float* in, int n) {
  const int t = thread();
  float v = 0;
  if (planted && t % 2) {
    v = static_cast<float>(__ballot_sync(kFullMask, t));
  } else {
    v = __shfl_xor_sync(kFullMask, get(in, n), 1);
  }
  put(out, n, v);
}

// ------------------------------------------------------------------------------------------------
// memory

template <bool planted>
__global__ void load_past_end(float* out, const float* in, int n) {
  for (int i = thread(); planted ? i <= n : i < n; i += kBlock) store(out + i % n, load(in + i));
}

template <bool planted>
__global__ void store_past_end(float* out, const float* in, int n) {
  for (int i = thread(); planted ? i <= n : i < n; i += kBlock) store(out + i, load(in + i % n));
}

// The same, around load() and store(): only the pages and sanitizers see these.
template <bool planted>
__global__ void raw_load_past_end(float* out, const float* in, int n) {
  for (int i = thread(); planted ? i <= n : i < n; i += kBlock) out[i % n] = in[i];
}

template <bool planted>
__global__ void raw_load_before_start(float* out, const float* in, int n) {
  for (int i = thread(); i < n; i += kBlock) out[i] = in[planted ? i - 1 : i];
}

template <bool planted>
__global__ void raw_store_past_end(float* out, const float* in, int n) {
  for (int i = thread(); planted ? i <= n : i < n; i += kBlock) out[i] = in[i % n];
}

// One element past the end of a buffer that does not end at a guard page.
template <bool planted>
__global__ void store_beside(float* out, const float* in, int n) {
  for (int i = thread(); planted ? i <= n : i < n; i += kBlock) out[i] = in[i % n];
}

// A whole pack where less than one is left.
template <bool planted>
__global__ void pack_over_tail(float* out, const float* in, int n) {
  for (int i = 4 * thread(); i < n; i += 4 * kBlock) {
    if (planted || i + 4 <= n) {
      const auto pack = cuda::load_pack<4>(in + i);
      for (int k = 0; k < 4 && i + k < n; ++k) store(out + i + k, pack.v[k]);
    } else {
      for (int k = i; k < n; ++k) store(out + k, load(in + k));
    }
  }
}

// The last element is nobody's.
template <bool planted>
__global__ void tail_left_out(float* out, const float* in, int n) {
  for (int i = thread(); i < n - planted; i += kBlock) store(out + i, load(in + i));
}

// Adds to what nobody has written.
template <bool planted>
__global__ void uninitialised_global(float* out, const float* in, int n) {
  for (int i = thread(); i < n; i += kBlock)
    store(out + i, load(in + i) + (planted ? load(out + i) : 0.0f));
}

template <bool planted>
__global__ void store_to_input(float* out, const float* in, int n) {
  for (int i = thread(); i < n; i += kBlock) {
    store(out + i, load(in + i));
    if (planted && i == n - 1) store(const_cast<float*>(in) + i, 0.0f);
  }
}

template <bool planted>
__global__ void raw_store_to_input(float* out, const float* in, int n) {
  put(out, n, get(in, n));
  if (planted && threadIdx.x == 5) const_cast<float*>(in)[5] = 0;
}

// An index in 32 bits where it needs 64.
template <bool planted>
__global__ void index_overflow(float* out, const float* in, int n) {
  const int t = thread();
  constexpr int kStride = 1 << 26;
  const int64_t i = planted ? int64_t{t * kStride} : int64_t{t} * kStride;
  if (t < n && i / kStride == t) store(out + t, load(in + t));
}

template <bool planted>
__global__ void too_much_shared(float* out, const float* in, int n) {
  FASTOPS_SHARED(float, s, planted ? 12289 : 12288);
  s[thread()] = get(in, n);
  put(out, n, s[thread()]);
}

template <bool planted>
__global__ void misaligned_pack(float* out, const float* in, int) {
  if (thread() >= 8) return;
  const int i = 4 * thread();
  cuda::store_pack<4>(out + i, cuda::load_pack<4>(in + i + planted));
}

template <bool planted>
__global__ void raw_misaligned_pack(float* out, const float* in, int) {
  using Four = cuda::Pack<float, 4>;
  if (thread() >= 8) return;
  const int i = 4 * thread();
  const Four pack = *reinterpret_cast<const Four*>(in + i + planted);
  for (int k = 0; k < 4; ++k) out[i + k] = pack.v[k];
}

template <bool planted>
__global__ void shared_past_end(float* out, const float* in, int n) {
  FASTOPS_SHARED(float, s, kBlock);
  const int t = thread();
  s[planted ? t + 1 : t] = get(in, n);
  __syncthreads();
  put(out, n, s[t]);
}

template <bool planted>
__global__ void uninitialised_shared(float* out, const float* in, int n) {
  FASTOPS_SHARED(float, s, kBlock);
  const int t = thread();
  if (!planted || t < kBlock - 4) s[t] = get(in, n);  // the last four are read by the first
  __syncthreads();
  put(out, n, s[kBlock - 1 - t]);
}

template <bool planted>
struct Parameters {
  char bytes[planted ? 32768 : 32000];
};
template <bool planted>
__global__ void many_parameters(const Parameters<planted> __grid_constant__ parameters,
                                float* out) {
  if (threadIdx.x == 0) store(out, static_cast<float>(parameters.bytes[0]));
}

// ------------------------------------------------------------------------------------------------
// runs

constexpr int kCount =
    37;  // elements of `in` and `out`: odd, so that a 16-byte boundary is not the end

struct Run {
  float *in, *out;
  Error error = nullptr;
  bool planted, known = false;

  void operator()(void (*clean)(float*, const float*, int), void (*bug)(float*, const float*, int),
                  int threads, int64_t blocks = 1) {
    known = true;
    error = cuda::launch(planted ? bug : clean, blocks, threads, nullptr, out, in, kCount);
  }
};

// `out` afterwards; the status of the program if there is no more to do.
int run(const char* name, bool planted, float (&result)[kCount]) {
  Run run{};
  run.planted = planted;
  const bool flush =
      std::strncmp(name, "raw_", 4) == 0 && std::strcmp(name, "raw_misaligned_pack") != 0;
  const size_t bytes = kCount * sizeof(float);
  const bool before = std::strstr(name, "before") != nullptr;
  run.in = static_cast<float*>(emulation::allocate(bytes, 0, flush && !before));
  run.out = static_cast<float*>(emulation::allocate(bytes, 0, flush && !before));
  for (int i = 0; i < kCount; ++i) run.in[i] = 1;
  const bool all = std::strstr(name, "tail_left_out") || std::strstr(name, "uninitialised_global");
  if (!all) std::memset(run.out, 0, bytes);  // most kernels write a part, or add
  emulation::protect(run.in);

#define BUG(kernel, ...) \
  if (!std::strcmp(name, #kernel)) run(&kernel<false>, &kernel<true>, __VA_ARGS__)
  BUG(missing_syncthreads, kBlock);
  BUG(missing_second_syncthreads, kBlock);
  BUG(missing_syncwarp, 32);
  BUG(wrong_scope, kBlock);
  BUG(last_writer_wins, kBlock);
  BUG(shuffle_as_barrier, 32);
  BUG(cross_block_race, 32, 4);
  BUG(missing_atomic, kBlock);
  BUG(divergent_barrier, kBlock);
  BUG(barrier_after_return, kBlock);
  BUG(deadlock, kBlock);
  BUG(mask_without_caller, 32);
  BUG(mask_with_returned_lane, 32);
  BUG(mask_beyond_block, 16);
  BUG(shuffle_from_outside, 32);
  BUG(different_operations, 32);
  BUG(load_past_end, kBlock);
  BUG(store_past_end, kBlock);
  BUG(raw_load_past_end, kBlock);
  BUG(raw_load_before_start, kBlock);
  BUG(raw_store_past_end, kBlock);
  BUG(store_beside, kBlock);
  BUG(pack_over_tail, kBlock);
  BUG(tail_left_out, kBlock);
  BUG(uninitialised_global, kBlock);
  BUG(store_to_input, kBlock);
  BUG(raw_store_to_input, kBlock);
  BUG(index_overflow, kBlock);
  BUG(too_much_shared, kBlock);
  BUG(misaligned_pack, kBlock);
  BUG(raw_misaligned_pack, kBlock);
  BUG(shared_past_end, kBlock);
  BUG(uninitialised_shared, kBlock);
#undef BUG
  if (!std::strcmp(name, "too_many_threads"))
    run(&barrier_after_return<false>, &barrier_after_return<false>, planted ? 2048 : 1024);
  if (!std::strcmp(name, "empty_grid"))
    run(&barrier_after_return<false>, &barrier_after_return<false>, kBlock, planted ? 0 : 1);
  if (!std::strcmp(name, "too_many_parameters")) {
    const Parameters<true> large{};
    const Parameters<false> small{};
    run.known = true;
    run.error = planted ? cuda::launch(&many_parameters<true>, 1, 32, nullptr, large, run.out)
                        : cuda::launch(&many_parameters<false>, 1, 32, nullptr, small, run.out);
  }

  if (!run.known) {
    std::printf("no such bug\n");
    return 64;
  }
  std::memcpy(result, run.out, bytes);
  const bool whole = emulation::release_buffer(run.in) & emulation::release_buffer(run.out);
  if (run.error) std::printf("%s\n", run.error);
  if (!whole) std::printf("memory beside a buffer was overwritten\n");
  return run.error || !whole;
}

int run_twice(const char* name, bool planted) {
  float forward[kCount], reverse[kCount];
  if (const int status = run(name, planted, forward)) return status;
  emulation::order = emulation::Order::kReverse;
  if (const int status = run(name, planted, reverse)) return status;
  const bool nan = std::any_of(forward, forward + kCount, [](float v) { return v != v; });
  const bool same = std::memcmp(forward, reverse, sizeof forward) == 0;
  if (nan) std::printf("NaN in the result\n");
  if (!same) std::printf("the result depends on the order of threads\n");
  if (nan || !same) return 1;
  std::printf("nothing found\n");
  return 0;
}

}  // namespace
}  // namespace fastops

int main(int count, char** arguments) {
  if (count != 3) return 64;
  fastops::emulation::explain_faults();
  return fastops::run_twice(arguments[1], !std::strcmp(arguments[2], "planted"));
}
