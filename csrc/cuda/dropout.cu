// Dropout: words from the counter-based generator, keep or drop. The word of an element depends on
// the seed and its logical index alone, so the mask is the CPU's, bit for bit, for any grid,
// alignment and memory layout.
#include "../formulas/dropout.h"
#include "../kernels/dropout.h"
#include "column_sums.cuh"
#include "launch.cuh"
#include "pack.cuh"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = 4;  // of one counter

// A group: as many consecutive elements as fill a pack, and at least those of one counter.
template <class scalar_t>
constexpr int group_size = pack_size<scalar_t> > kWords ? pack_size<scalar_t> : kWords;

// The second of three inputs is a row of `period` elements that is repeated; `wide_row`: read in
// packs as well.
template <class scalar_t, int inputs>
struct Inputs {
  const scalar_t* p[inputs];
  int64_t period;
  bool wide_row;
};

struct Mask {
  const int64_t* seed;
  uint32_t threshold;
};

struct Key {
  uint32_t k0, k1;
  __device__ __forceinline__ explicit Key(const int64_t* seed) {
    const int64_t s = load(seed);
    k0 = static_cast<uint32_t>(s);
    k1 = static_cast<uint32_t>(s >> 32);
  }
  __device__ __forceinline__ Philox<uint32_t> words(int64_t counter) const {
    return {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), k0, k1};
  }
};

// ------------------------------------------------------------------------------------------------
// kernels

// Calls body(first element of the group, number of its elements) for every group of this thread.
template <int size, class Body>
__device__ __forceinline__ void groups(int64_t n, Body body) {
  const int64_t step = int64_t{gridDim.x} * kThreads * size;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * size; i < n; i += step)
    body(i, n - i < size ? n - i : size);
}

template <class Op, class scalar_t>
__device__ __forceinline__ void keep_or_drop(const Inputs<scalar_t, Op::inputs>& in, scalar_t* out,
                                             int64_t i, int64_t count, bool wide,
                                             const bool (&keep)[group_size<scalar_t>],
                                             real_of<scalar_t> scale) {
  constexpr int size = group_size<scalar_t>;
  real_of<scalar_t> x[Op::inputs][size];
  wide = wide && count == size;
#pragma unroll
  for (int j = 0; j < Op::inputs; ++j) {
    if (j == 1 && wide && in.wide_row) {
      load_wide(in.p[j] + i % in.period, x[j]);
    } else if (j == 1) {
#pragma unroll
      for (int k = 0; k < size; ++k)
        x[j][k] =
            k < count ? static_cast<real_of<scalar_t>>(load(in.p[j] + (i + k) % in.period)) : 0;
    } else if (wide) {
      load_wide(in.p[j] + i, x[j]);
    } else {
      load_narrow(in.p[j] + i, count, x[j]);
    }
  }
#pragma unroll
  for (int k = 0; k < size; ++k) {
    if constexpr (Op::inputs == 1) x[0][k] = Op::forward(keep[k], scale, x[0][k]);
    if constexpr (Op::inputs == 3) x[0][k] = Op::forward(keep[k], scale, x[0][k], x[1][k], x[2][k]);
  }
  if (wide) {
    store_wide(out + i, x[0]);
  } else {
    store_narrow(out + i, count, x[0]);
  }
}

// Memory order is logical order: the elements of a group share their counters.
template <class Op, class scalar_t>
__global__ void __launch_bounds__(kThreads, kResident)
    contiguous_kernel(int64_t n, scalar_t* out, Inputs<scalar_t, Op::inputs> in, bool wide,
                      Mask mask, real_of<scalar_t> scale) {
  constexpr int size = group_size<scalar_t>;
  const Key key(mask.seed);
  groups<size>(n, [&](int64_t i, int64_t count) {
    bool keep[size];
#pragma unroll
    for (int j = 0; j < size; j += kWords) {
      const Philox<uint32_t> philox = key.words((i + j) / kWords);
#pragma unroll
      for (int k = 0; k < kWords; ++k) keep[j + k] = philox.word[k] >= mask.threshold;
    }
    keep_or_drop<Op>(in, out, i, count, wide, keep, scale);
  });
}

// Any other order: every element has a counter of its own. Coordinates are divided out once a
// group, and then walked.
template <class Op, class scalar_t, class index_t>
__global__ void __launch_bounds__(kThreads, kResident)
    strided_kernel(int64_t n, scalar_t* out, Inputs<scalar_t, Op::inputs> in, bool wide, Mask mask,
                   real_of<scalar_t> scale, const LogicalOrder __grid_constant__ order) {
  constexpr int size = group_size<scalar_t>;
  const Key key(mask.seed);
  groups<size>(n, [&](int64_t i, int64_t count) {
    index_t at[kMaxDims];
    int64_t logical = 0;
    index_t rest = static_cast<index_t>(i);
#pragma unroll
    for (int d = kMaxDims - 1; d >= 0; --d) {
      if (d >= order.dims) continue;
      const index_t extent = static_cast<index_t>(order.size[d]);
      at[d] = rest % extent;
      rest /= extent;
      logical += static_cast<int64_t>(at[d]) * order.logical_stride[d];
    }
    bool keep[size];
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const Philox<uint32_t> philox = key.words(logical / kWords);
      const int which = static_cast<int>(logical % kWords);
      const uint32_t low = which & 1 ? philox.word[1] : philox.word[0];
      const uint32_t high = which & 1 ? philox.word[3] : philox.word[2];
      keep[k] = (which & 2 ? high : low) >= mask.threshold;
      bool carry = true;
#pragma unroll
      for (int d = kMaxDims - 1; d >= 0; --d) {
        if (d >= order.dims || !carry) continue;
        logical += order.logical_stride[d];
        carry = ++at[d] == static_cast<index_t>(order.size[d]);
        if (carry) {
          logical -= order.size[d] * order.logical_stride[d];
          at[d] = 0;
        }
      }
    }
    keep_or_drop<Op>(in, out, i, count, wide, keep, scale);
  });
}

// Of contiguous rows, and the sums of the output over the rows of each strip: a thread goes down
// `width` columns of one.
template <class Op, int width, class scalar_t>
__global__ void __launch_bounds__(kThreads, kResident)
    summed_kernel(int64_t rows, int64_t period, scalar_t* out, const scalar_t* in, Mask mask,
                  real_of<scalar_t> scale, real_of<scalar_t>* sums) {
  using real = real_of<scalar_t>;
  const Key key(mask.seed);
  const auto compute = [&](int64_t i, real(&x)[width]) {
    load_columns(in + i, x);
#pragma unroll
    for (int j = 0; j < width; j += kWords) {
      const Philox<uint32_t> philox = key.words((i + j) / kWords);
      if constexpr (width == 1) {
        x[0] = Op::forward(philox.word[i % kWords] >= mask.threshold, scale, x[0]);
      } else {
#pragma unroll
        for (int m = 0; m < kWords; ++m)
          x[j + m] = Op::forward(philox.word[m] >= mask.threshold, scale, x[j + m]);
      }
    }
  };
  for_each_row_block<width, kThreads>(rows, period, out, sums, [&](int64_t) { return compute; });
}

// ------------------------------------------------------------------------------------------------
// launchers

template <class Op>
Error forward(const DropoutArgs& a) {
  static_assert(Op::inputs == 1 || Op::inputs == 3);
  if (a.n == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    auto* out = static_cast<scalar_t*>(a.out);
    Inputs<scalar_t, Op::inputs> in;
    for (int j = 0; j < Op::inputs; ++j) in.p[j] = static_cast<const scalar_t*>(a.in[j]);
    in.period = a.period;
    in.wide_row =
        Op::inputs == 3 && a.period % group_size<scalar_t> == 0 && aligned(in.p[Op::inputs / 2]);
    const Mask mask{a.seed, a.threshold};
    const auto scale = static_cast<real_of<scalar_t>>(a.scale);
    const int64_t blocks =
        grid_for((a.n + group_size<scalar_t> - 1) / group_size<scalar_t>, kThreads);
    const bool wide = aligned(out, in.p[0], in.p[Op::inputs - 1]);
    if (a.order.dims == 1 && a.order.logical_stride[0] == 1)
      return launch(contiguous_kernel<Op, scalar_t>, blocks, kThreads, a.stream, a.n, out, in, wide,
                    mask, scale);
    auto* kernel = a.n < int64_t{1} << 31 ? strided_kernel<Op, scalar_t, uint32_t>
                                          : strided_kernel<Op, scalar_t, uint64_t>;
    return launch(kernel, blocks, kThreads, a.stream, a.n, out, in, wide, mask, scale, a.order);
  });
}

template <class Op, class scalar_t>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_kernel(AlignedSpan cut, scalar_t* dx, const scalar_t* y, const scalar_t* dy,
                    real_of<scalar_t> scale) {
  using real = real_of<scalar_t>;
  constexpr int size = pack_size<scalar_t>;
  for_each_pack<size>(
      cut, int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads,
      [&](int64_t i) {
        real s[size], g[size];
        load_wide(y + i, s);
        load_wide(dy + i, g);
#pragma unroll
        for (int k = 0; k < size; ++k) g[k] = Op::backward(s[k], g[k], scale);
        store_wide(dx + i, g);
      },
      [&](int64_t i) {
        const real s = static_cast<real>(load(y + i)), g = static_cast<real>(load(dy + i));
        store(dx + i, static_cast<scalar_t>(Op::backward(s, g, scale)));
      });
}

template <class Op>
Error backward(const DropoutArgs& a) {
  if (a.n == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    constexpr int size = pack_size<scalar_t>;
    auto* dx = static_cast<scalar_t*>(a.out);
    auto* y = static_cast<const scalar_t*>(a.in[0]);
    auto* dy = static_cast<const scalar_t*>(a.in[1]);
    const AlignedSpan whole = aligned_span(a.n, size, dx, y, dy);
    const int64_t items = std::max(whole.packs, whole.n - whole.packs * size);
    return launch(backward_kernel<Op, scalar_t>, grid_for(items, kThreads), kThreads, a.stream,
                  whole, dx, y, dy, static_cast<real_of<scalar_t>>(a.scale));
  });
}

template <class Op>
Error summed(const DropoutArgs& a) {
  if (a.n == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    constexpr int size = group_size<scalar_t>;
    auto* out = static_cast<scalar_t*>(a.out);
    auto* in = static_cast<const scalar_t*>(a.in[0]);
    auto* sums = static_cast<real_of<scalar_t>*>(a.sums);
    const int64_t rows = a.n / a.period;
    const bool wide = a.period % size == 0 && aligned(out, in) && aligned(sums);
    const int64_t items = row_block_items(rows, a.period, wide, size);
    return launch(wide ? summed_kernel<Op, size, scalar_t> : summed_kernel<Op, 1, scalar_t>,
                  grid_for(items, kThreads), kThreads, a.stream, rows, a.period, out, in,
                  Mask{a.seed, a.threshold}, static_cast<real_of<scalar_t>>(a.scale), sums);
  });
}

// ------------------------------------------------------------------------------------------------
// table

template <class Op>
struct MakeDropout {
  static constexpr DropoutKernel row_of() {
    DropoutKernel row{Op::name, Op::inputs, &forward<Op>, nullptr, nullptr};
    if constexpr (Op::from_output) row.backward = &backward<Op>;
    if constexpr (Op::own_derivative) row.summed = &summed<Op>;
    return row;
  }
  static constexpr DropoutKernel row = row_of();
};
using DropoutTable = Table<DropoutKernel, MakeDropout, Dropouts>;

}  // namespace

extern constinit const KernelTable<DropoutKernel> dropout_kernels{DropoutTable::rows,
                                                                  std::size(DropoutTable::rows)};

}  // namespace fastops::cuda
