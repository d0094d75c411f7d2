// The norm of all gradients, and the factor that clips it: one launch over the chunks of a list of
// tensors, its table of pointers among the kernel's parameters, and one that adds up the chunks.
#include "../kernels/gradient_norm.h"

#include "../formulas/gradient_norm.h"
#include "launch.cuh"
#include "pack.cuh"
#include "team.cuh"
#include "tensor_list.cuh"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;

// ------------------------------------------------------------------------------------------------
// kernels

// The gradients whose norm is taken. Block b adds up the chunk b - first[t] of the tensor t; see
// tensor_of_block().
template <class scalar_t>
struct Gradients {
  static constexpr int capacity =
      static_cast<int>((kParameterBytes - 64) / (sizeof(void*) + sizeof(int64_t) + sizeof(int)));
  const scalar_t* g[capacity];
  int64_t n[capacity];
  double* sums;
  int first[capacity + 1];
  int count;
};

template <class scalar_t>
__global__ void __launch_bounds__(kThreads, kResident)
    sums_kernel(const Gradients<scalar_t> __grid_constant__ batch) {
  using real = real_of<scalar_t>;
  constexpr int size = pack_size<scalar_t>;
  const int block = static_cast<int>(blockIdx.x);
  const int tensor = tensor_of_block(batch.first, batch.count, block);
  const int64_t begin = (block - batch.first[tensor]) * kGradientNormChunk;
  const int64_t left = batch.n[tensor] - begin;
  const scalar_t* g = batch.g[tensor] + begin;
  real sum = 0;
  for_each_pack<size>(
      aligned_span(left < kGradientNormChunk ? left : kGradientNormChunk, size, g), threadIdx.x,
      kThreads,
      [&](int64_t i) {
        real v[size];
        load_wide(g + i, v);
        real few = 0;
#pragma unroll
        for (int k = 0; k < size; ++k) few += v[k] * v[k];
        sum += few;
      },
      [&](int64_t i) {
        const real v = static_cast<real>(load(g + i));
        sum += v * v;
      });
  const double total = Team<kThreads>().sum(static_cast<double>(sum));
  if (threadIdx.x == 0) store(batch.sums + block, total);
}

template <class real>
__global__ void __launch_bounds__(kThreads, kResident)
    clip_kernel(const ClipArgs __grid_constant__ a) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < a.count; k += kThreads) sum += load(a.sums + k);
  sum = Team<kThreads>().sum(sum);
  if (threadIdx.x != 0) return;
  const Clip made(sum, a.grad_scale ? load(a.grad_scale) : 1.0f, static_cast<float>(a.max_norm));
  store(a.norm, static_cast<real>(made.norm));
  store(a.divisor, static_cast<real>(made.divisor));
}

// ------------------------------------------------------------------------------------------------
// launchers

Error sums_of_squares(const GradientNormArgs& a, double* sums) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using B = Gradients<decltype(zero)>;
    static_assert(sizeof(B) <= kParameterBytes);
    B batch;
    for (int64_t next = 0; next < a.count;) {
      int64_t blocks = 0;
      batch.count = 0;
      batch.sums = sums;
      for (; next < a.count && batch.count < B::capacity; ++next) {
        const GradientTensor& t = a.tensors[next];
        if (t.n == 0) continue;
        if (batch.count > 0 && blocks + gradient_norm_chunks(t.n) > INT32_MAX) break;
        const int k = batch.count++;
        batch.g[k] = static_cast<const decltype(zero)*>(t.g);
        batch.n[k] = t.n;
        batch.first[k] = static_cast<int>(blocks);
        blocks += gradient_norm_chunks(t.n);
      }
      batch.first[batch.count] = static_cast<int>(blocks);
      if (batch.count == 0) continue;
      const Error error = launch(sums_kernel<decltype(zero)>, blocks, kThreads, a.stream, batch);
      if (error) return error;
      sums += blocks;
    }
    return nullptr;
  });
}

Error clip(const ClipArgs& a) { return launch(clip_kernel<float>, 1, kThreads, a.stream, a); }

}  // namespace

extern constinit const GradientNormKernel gradient_norm_kernel{&sums_of_squares, &clip};

}  // namespace fastops::cuda
