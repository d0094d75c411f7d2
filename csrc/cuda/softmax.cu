// Softmax and log-softmax over the middle dimension of (outer, n, inner), forward and backward.
#include "../kernels/softmax.h"
#include "columns.cuh"
#include "row_tile.cuh"

namespace fastops::cuda {
namespace {

// ------------------------------------------------------------------------------------------------
// kernels: rows

template <class Op, class scalar_t, int threads, bool held>
__global__ void __launch_bounds__(kBlock<threads>, kRowBlocks<scalar_t, threads, held, 1>)
    softmax_kernel(int64_t rows, int64_t n, const scalar_t* x, scalar_t* y, bool wide) {
  using real = real_of<scalar_t>;
  using Tile = RowTile<scalar_t, threads, held, 1>;
  constexpr bool keep = Op::from_exponential && held && Tile::exact;
  const Team<threads> team;
  each_row<threads>(rows, [&](int64_t r) {
    const real lowest = c<real>(-std::numeric_limits<double>::infinity());
    Tile tile(n, x + r * n, nullptr, true, lowest, team.rank);
    const LogSumExp<real> total = online_softmax<keep>(tile, team, [](auto, auto&, bool, real) {});
    const real base = LogSumExp<real>::origin(total.peak), constant = Op::constant(total.sum);
    tile.each([&](auto i, auto& v, bool has) {
#pragma unroll
      for (real& u : v[0]) {
        if constexpr (Op::from_exponential && !keep) u = exp_below(u - base);
        u = Op::forward(u, total.peak, constant);
      }
      tile.put(y + r * n, wide, i, v[0], has);
    });
  });
}

template <class Op, class scalar_t, int threads, bool held>
__global__ void __launch_bounds__(kBlock<threads>, kRowBlocks<scalar_t, threads, held, 2>)
    softmax_backward_kernel(int64_t rows, int64_t n, const scalar_t* y, const scalar_t* dy,
                            scalar_t* dx, bool wide_dy, bool wide_dx) {
  using real = real_of<scalar_t>;
  const Team<threads> team;
  each_row<threads>(rows, [&](int64_t r) {
    RowTile<scalar_t, threads, held, 2> tile(n, y + r * n, dy + r * n, wide_dy, real(0), team.rank);
    real total = 0;
    tile.each([&](auto, auto& v, bool) {
      real few = 0;
#pragma unroll
      for (int k = 0; k < static_cast<int>(std::size(v[0])); ++k)
        few += Op::summand(v[0][k], v[1][k]);
      total += few;
    });
    total = team.sum(total);
    tile.each([&](auto i, auto& v, bool has) {
#pragma unroll
      for (int k = 0; k < static_cast<int>(std::size(v[0])); ++k)
        v[0][k] = Op::backward(v[0][k], v[1][k], total);
      tile.put(dx + r * n, wide_dx, i, v[0], has);
    });
  });
}

// ------------------------------------------------------------------------------------------------
// kernels: columns

template <class Op, class scalar_t>
__global__ void __launch_bounds__(kColumnBlock, kResident)
    softmax_columns_kernel(Tiles tiles, const scalar_t* x, scalar_t* y) {
  using real = real_of<scalar_t>;
  tiles.each([&](int64_t, int64_t offset, bool live) {
    const LogSumExp<real> total =
        online_softmax_of_column(tiles, x + offset, live, [](int64_t, real, real) {});
    const real base = LogSumExp<real>::origin(total.peak), constant = Op::constant(total.sum);
    for (int64_t j = tiles.first(); live && j < tiles.n; j += tiles.slices()) {
      const int64_t at = offset + j * tiles.inner;
      real u = static_cast<real>(load(x + at));
      if constexpr (Op::from_exponential) u = exp_below(u - base);
      store(y + at, static_cast<scalar_t>(Op::forward(u, total.peak, constant)));
    }
  });
}

template <class Op, class scalar_t>
__global__ void __launch_bounds__(kColumnBlock, kResident)
    softmax_columns_backward_kernel(Tiles tiles, const scalar_t* y, const scalar_t* dy,
                                    scalar_t* dx) {
  using real = real_of<scalar_t>;
  tiles.each([&](int64_t, int64_t offset, bool live) {
    real total = 0;
    for (int64_t j = tiles.first(); live && j < tiles.n; j += tiles.slices()) {
      const int64_t at = offset + j * tiles.inner;
      total += Op::summand(static_cast<real>(load(y + at)), static_cast<real>(load(dy + at)));
    }
    total = tiles.sum(total);
    for (int64_t j = tiles.first(); live && j < tiles.n; j += tiles.slices()) {
      const int64_t at = offset + j * tiles.inner;
      const real u = static_cast<real>(load(y + at)), g = static_cast<real>(load(dy + at));
      store(dx + at, static_cast<scalar_t>(Op::backward(u, g, total)));
    }
  });
}

// ------------------------------------------------------------------------------------------------
// launchers

template <class Op>
Error softmax(const SoftmaxArgs& a) {
  if (a.outer * a.n * a.inner == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    auto* x = static_cast<const scalar_t*>(a.in[0]);
    auto* y = static_cast<scalar_t*>(a.out);
    if (a.inner > 1)
      return launch_columns(softmax_columns_kernel<Op, scalar_t>, a.stream, a.outer, a.n, a.inner,
                            x, y);
    return by_length<scalar_t, 1>(a.n, [&](auto threads, auto held) {
      return launch_rows<threads>(softmax_kernel<Op, scalar_t, threads, held>, a.stream, a.outer,
                                  a.n, x, y, same_alignment<scalar_t>(x, y));
    });
  });
}

template <class Op>
Error softmax_backward(const SoftmaxArgs& a) {
  if (a.outer * a.n * a.inner == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    auto* y = static_cast<const scalar_t*>(a.in[0]);
    auto* dy = static_cast<const scalar_t*>(a.in[1]);
    auto* dx = static_cast<scalar_t*>(a.out);
    if (a.inner > 1)
      return launch_columns(softmax_columns_backward_kernel<Op, scalar_t>, a.stream, a.outer, a.n,
                            a.inner, y, dy, dx);
    return by_length<scalar_t, 2>(a.n, [&](auto threads, auto held) {
      return launch_rows<threads>(softmax_backward_kernel<Op, scalar_t, threads, held>, a.stream,
                                  a.outer, a.n, y, dy, dx, same_alignment(y, dy),
                                  same_alignment<scalar_t>(y, dx));
    });
  });
}

// ------------------------------------------------------------------------------------------------
// table

template <class Op>
struct MakeSoftmax {
  static constexpr SoftmaxKernel kernel{Op::name, &softmax<Op>, &softmax_backward<Op>, Op::is_log};
};
using SoftmaxTable = Table<SoftmaxKernel, MakeSoftmax, Softmaxes>;

}  // namespace

extern constinit const KernelTable<SoftmaxKernel> softmax_kernels{SoftmaxTable::kernels,
                                                                  std::size(SoftmaxTable::kernels)};

}  // namespace fastops::cuda
