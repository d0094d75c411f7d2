// The elementwise loop of two inputs, of which the second may be one row, repeated.
#include "../formulas/activations.h"
#include "../kernels/elementwise.h"
#include "column_sums.cuh"
#include "launch.cuh"
#include "pack.cuh"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;

template <class scalar_t, int inputs>
struct Inputs {
  const scalar_t* p[inputs];
};

// out[i] = F(in[0][i], in[1][i % period], in[2][i]). Where rows are whole packs, `wide_row` says
// that in[1] is read in packs too. out may be in[0]: no __restrict__.
template <class F, class scalar_t, int inputs>
__global__ void __launch_bounds__(kThreads, kResident)
    fused_kernel(AlignedSpan cut, int64_t period, bool wide_row, scalar_t* out,
                 Inputs<scalar_t, inputs> in) {
  using real = real_of<scalar_t>;
  constexpr int size = pack_size<scalar_t>;
  const auto f = [&](const real(&x)[inputs]) {
    if constexpr (inputs == 2) return F::apply(x[0], x[1]);
    if constexpr (inputs == 3) return F::apply(x[0], x[1], x[2]);
  };
  for_each_pack<size>(
      cut, int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads,
      [&](int64_t i) {
        real x[inputs][size], y[size];
        load_wide(in.p[0] + i, x[0]);
        if constexpr (inputs == 3) load_wide(in.p[2] + i, x[2]);
        load_beside(in.p[1], i, period, wide_row, x[1]);
#pragma unroll
        for (int k = 0; k < size; ++k) {
          real each[inputs];
#pragma unroll
          for (int m = 0; m < inputs; ++m) each[m] = x[m][k];
          y[k] = f(each);
        }
        store_wide(out + i, y);
      },
      [&](int64_t i) {
        real x[inputs];
#pragma unroll
        for (int m = 0; m < inputs; ++m)
          x[m] = static_cast<real>(load(in.p[m] + (m == 1 ? i % period : i)));
        store(out + i, static_cast<scalar_t>(f(x)));
      });
}

template <class F, int inputs>
Error fused(const FusedArgs& a) {
  if (a.n == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    constexpr int size = pack_size<scalar_t>;
    auto* out = static_cast<scalar_t*>(a.out);
    Inputs<scalar_t, inputs> in;
    for (int j = 0; j < inputs; ++j) in.p[j] = static_cast<const scalar_t*>(a.in[j]);
    const AlignedSpan whole = aligned_span(a.n, size, out, in.p[0], in.p[inputs == 3 ? 2 : 0]);
    const bool wide_row = wide_beside(whole, size, in.p[1], a.period);
    const int64_t items = std::max(whole.packs, whole.n - whole.packs * size);
    return launch(fused_kernel<F, scalar_t, inputs>, grid_for(items, kThreads), kThreads, a.stream,
                  whole, a.period, wide_row, out, in);
  });
}

// The same of three inputs, and the sums of out over the rows of each strip: a thread goes down
// `width` columns of one.
template <class F, int width, class scalar_t>
__global__ void __launch_bounds__(kThreads, kResident)
    summed_kernel(int64_t rows, int64_t period, scalar_t* out, Inputs<scalar_t, 3> in,
                  real_of<scalar_t>* sums) {
  using real = real_of<scalar_t>;
  for_each_row_block<width, kThreads>(rows, period, out, sums, [&](int64_t left) {
    Pack<real, width> t;
    load_columns(in.p[1] + left, t.v);
    return [&in, t](int64_t i, real(&x)[width]) {
      real dy[width];
      load_columns(in.p[0] + i, x);
      load_columns(in.p[2] + i, dy);
#pragma unroll
      for (int m = 0; m < width; ++m) x[m] = F::apply(x[m], t.v[m], dy[m]);
    };
  });
}

template <class F>
Error summed(const FusedArgs& a) {
  if (a.n == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    constexpr int size = pack_size<scalar_t>;
    auto* out = static_cast<scalar_t*>(a.out);
    auto* sums = static_cast<real_of<scalar_t>*>(a.sums);
    Inputs<scalar_t, 3> in;
    for (int j = 0; j < 3; ++j) in.p[j] = static_cast<const scalar_t*>(a.in[j]);
    const int64_t rows = a.n / a.period;
    const bool wide =
        a.period % size == 0 && aligned(out, in.p[0], in.p[1], in.p[2]) && aligned(sums);
    const int64_t items = row_block_items(rows, a.period, wide, size);
    return launch(wide ? summed_kernel<F, size, scalar_t> : summed_kernel<F, 1, scalar_t>,
                  grid_for(items, kThreads), kThreads, a.stream, rows, a.period, out, in, sums);
  });
}

template <class Op>
struct Forward {
  template <class T>
  static FASTOPS_FN T apply(T x, T t) {
    return Op::forward(x, t);
  }
};
template <class Op>
struct Backward {
  template <class T>
  static FASTOPS_FN T apply(T x, T t, T dy) {
    return Op::backward(x, t, dy);
  }
};

template <class Op>
struct MakeFused {
  static constexpr FusedKernel row_of() {
    FusedKernel row{Op::name, Op::activation, Op::broadcast, &fused<Forward<Op>, 2>,
                    nullptr,  nullptr};
    if constexpr (Op::broadcast)
      row.backward = &fused<Backward<Op>, 3>, row.summed = &summed<Backward<Op>>;
    return row;
  }
  static constexpr FusedKernel row = row_of();
};
using FusedTable = Table<FusedKernel, MakeFused, Fused>;

}  // namespace

extern constinit const KernelTable<FusedKernel> fused_kernels{FusedTable::rows,
                                                              std::size(FusedTable::rows)};

}  // namespace fastops::cuda
