// Rows whose elements are apart in memory, (outer, n, inner) with inner > 1: neighbouring threads
// take neighbouring rows, so that every access is coalesced. And the running maximum and sum of
// exponentials of such a row. No formula but that.
#pragma once
#include "../formulas/softmax.h"
#include "arithmetic.cuh"
#include "launch.cuh"
#include "pack.cuh"

namespace fastops::cuda {

constexpr int kColumnBlock = 256;  // threads of a block that takes up to 32 columns

// A block takes `width` (a power of two, at most 32) neighbouring rows of (outer, n, inner), and
// kColumnBlock / width threads share each: thread t has column t % width and elements t / width, t
// / width + slices, ...
struct Tiles {
  int64_t outer, n, inner;
  int width;

  __host__ __device__ int64_t per_outer() const { return (inner + width - 1) / width; }
  // body(index of the row among outer * inner, offset of its first element, whether there is such a
  // row)
  template <class Body>
  __device__ __forceinline__ void each(Body body) const {
    const int64_t count = outer * per_outer();
    for (int64_t tile = blockIdx.x; tile < count; tile += gridDim.x) {
      const int64_t o = quotient(tile, per_outer());
      const int64_t i = (tile - o * per_outer()) * width + threadIdx.x % width;
      body(o * inner + i, o * n * inner + i, i < inner);
    }
  }
  __device__ __forceinline__ int64_t first() const { return threadIdx.x / width; }
  __device__ __forceinline__ int64_t slices() const { return kColumnBlock / width; }

  // Joins the values of the threads of each column; all of them get the result.
  template <class T, class F>
  __device__ __forceinline__ T join(T value, F f) const {
    FASTOPS_SHARED(T, each_thread, kColumnBlock);
    const int t = static_cast<int>(threadIdx.x);
    __syncthreads();  // the last join may still be read
    each_thread[t] = value;
    __syncthreads();
    for (int half = kColumnBlock / 2; half >= width; half /= 2) {
      if (t < half) each_thread[t] = f(each_thread[t], each_thread[t + half]);
      __syncthreads();
    }
    return each_thread[t % width];
  }
  template <class T>
  __device__ __forceinline__ T sum(T value) const {
    return join(value, [](T a, T b) { return a + b; });
  }
  template <class T>
  __device__ __forceinline__ T maximum(T value) const {
    return join(value, [](T a, T b) { return max(a, b); });
  }
};

template <class scalar_t, class Visitor>
__device__ __forceinline__ LogSumExp<real_of<scalar_t>> online_softmax_of_column(const Tiles& tiles,
                                                                                 const scalar_t* x,
                                                                                 bool live,
                                                                                 Visitor visitor) {
  using real = real_of<scalar_t>;
  LogSumExp<real> mine;
  real base = LogSumExp<real>::origin(mine.peak);
  for (int64_t j = tiles.first(); live && j < tiles.n; j += tiles.slices()) {
    const real u = static_cast<real>(load(x + j * tiles.inner)),
               peak = fastops::cuda::maximum(mine.peak, u);
    if (peak != mine.peak) {
      base = LogSumExp<real>::origin(peak);
      mine.sum *= exp_below(mine.peak - base);
      mine.peak = peak;
    }
    visitor(j, u, base);
    mine.sum += exp_below(u - base);
  }
  const real peak = tiles.maximum(mine.peak);
  mine.sum = tiles.sum(mine.sum * exp_below(mine.peak - LogSumExp<real>::origin(peak)));
  mine.peak = peak;
  return mine;
}

template <class... Parameters, class... Arguments>
Error launch_columns(void (*kernel)(Parameters...), void* stream, int64_t outer, int64_t n,
                     int64_t inner, Arguments... arguments) {
  Tiles tiles{outer, n, inner, 1};
  while (tiles.width < kWarp && tiles.width < inner) tiles.width *= 2;
  const int64_t blocks = std::min<int64_t>(outer * tiles.per_outer(), INT32_MAX);
  return launch(kernel, blocks, kColumnBlock, stream, tiles, arguments...);
}

}  // namespace fastops::cuda
