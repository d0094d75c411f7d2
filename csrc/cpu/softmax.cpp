// Softmax and log-softmax over the middle dimension of (outer, n, inner), forward and backward.
#include "../formulas/softmax.h"
#include "../kernels/softmax.h"
#include "strided_rows.h"

namespace fastops::CPU_CAPABILITY {
namespace {

// `first` and `next` as of online_softmax().
template <class Op, class L, class scalar_t, class real>
FASTOPS_FN void softmax_row(const scalar_t* x, const Out<L, scalar_t>& y,
                            const ExpScratch<L>& scratch, int64_t n, real& first,
                            const scalar_t* next) {
  using V = typename L::V;
  OnlineSoftmax<real> v;
  real* const exponential = Op::from_exponential ? scratch.beside(y.row) : nullptr;
  online_softmax<L>(x, n, first, next, exponential, v);
  const V k(Op::constant(static_cast<real>(v.sum))), peak(v.peak);
  if constexpr (Op::from_exponential) {
    each_exponential<L>(x, exponential, y, n, v, [&](int64_t i, auto count, auto& e, V rescale) {
      for (int j = 0; j < L::count; ++j) e[j] = Op::forward(e[j] * rescale, peak, k);
      y.store(i, count, e);
    });
  } else {
    y.for_each_vector(0, n, [&](int64_t i, auto count) {
      V u[L::count];
      L::load(x + i, count, u);
      for (int j = 0; j < L::count; ++j) u[j] = Op::forward(u[j], peak, k);
      y.store(i, count, u);
    });
  }
}

template <class Op, class L, class scalar_t>
FASTOPS_FN void softmax_row_backward(const scalar_t* y, const scalar_t* dy,
                                     const Out<L, scalar_t>& dx, int64_t n) {
  using real = typename L::real;
  using V = typename L::V;
  double total = 0;
  [[maybe_unused]] PromotedSum<V> wide;
  for (int64_t begin = 0; begin < n; begin += kMinBlock) {
    V sum(real(0));
    each_group<L>(y, begin, begin + kMinBlock < n ? begin + kMinBlock : n,
                  [&](int64_t i, auto count, auto& vy) {
                    V g[L::count];
                    L::load(dy + i, count, g);
                    for (int j = 0; j < L::count; ++j) g[j] = Op::summand(vy[j], g[j]);
                    if (count < L::size) L::mask_tail(count, 0, g);
                    for (int j = 0; j < L::count; ++j) {
                      if constexpr (Op::cancels) {
                        wide.add(g[j]);
                      } else {
                        sum = sum + g[j];
                      }
                    }
                  });
    total += sum_of_lanes(sum);
  }
  if constexpr (Op::cancels) total = wide.total();
  const V all(static_cast<real>(total));
  dx.for_each_vector(0, n, [&](int64_t i, auto count) {
    V vy[L::count], g[L::count];
    L::load(y + i, count, vy);
    L::load(dy + i, count, g);
    for (int j = 0; j < L::count; ++j) g[j] = Op::backward(vy[j], g[j], all);
    dx.store(i, count, g);
  });
}

template <class Op, class L, class scalar_t>
FASTOPS_FN void softmax_columns(const scalar_t* x, scalar_t* y, int64_t n, int64_t inner,
                                int64_t count, typename L::real* memory) {
  using V = typename L::V;
  RowTile<L, scalar_t> tile(x, n, inner, count, memory);
  tile.each([&](int64_t i, const StridedRows<L, scalar_t>& c) {
    V peak[L::count], sum[L::count];
    c.peaks(n, peak);
    c.template exponentials<Op::from_exponential>(n, peak, sum);
    for (auto& s : sum) s = Op::constant(s);
    for (int64_t j = 0; j < n; ++j) {
      V u[L::count];
      if constexpr (Op::from_exponential) {
        c.exponential(j, peak, u);
      } else {
        c.load(j, u);
      }
      for (int k = 0; k < L::count; ++k) u[k] = Op::forward(u[k], peak[k], sum[k]);
      c.store(j, u, y + i);
    }
  });
  tile.write(y);
}

template <class Op, class L, class scalar_t>
FASTOPS_FN void softmax_columns_backward(const scalar_t* y, const scalar_t* dy, scalar_t* dx,
                                         int64_t n, int64_t inner, int64_t count,
                                         typename L::real* memory) {
  using V = typename L::V;
  RowTile<L, scalar_t> outputs(y, n, inner, count, memory);
  RowTile<L, scalar_t> gradients(dy, n, inner, count,
                                 memory ? memory + RowTile<L, scalar_t>::kTiled : nullptr);
  gradients.each([&](int64_t i, const StridedRows<L, scalar_t>& gradient) {
    const StridedRows<L, scalar_t> output = outputs.columns(i);
    V total[L::count];
    for (auto& t : total) t = V(typename L::real(0));
    in_runs(n, [&](int64_t begin, int64_t end) {
      V sum[L::count];
      for (auto& s : sum) s = V(typename L::real(0));
      for (int64_t j = begin; j < end; ++j) {
        V u[L::count], g[L::count];
        output.load_first(j, u);
        gradient.load_first(j, g);
        for (int k = 0; k < L::count; ++k) sum[k] = sum[k] + Op::summand(u[k], g[k]);
      }
      for (int k = 0; k < L::count; ++k) total[k] = total[k] + sum[k];
    });
    for (int64_t j = 0; j < n; ++j) {
      V u[L::count], g[L::count];
      output.load(j, u);
      gradient.load(j, g);
      for (int k = 0; k < L::count; ++k) g[k] = Op::backward(u[k], g[k], total[k]);
      gradient.store(j, g, dx + i);
    }
  });
  gradients.write(dx);
}

template <class Op>
struct MakeSoftmax {
  static Error forward(const SoftmaxArgs& a) {
    return dispatch(a.dtype, [&](auto zero) -> Error {
      using scalar_t = decltype(zero);
      using L = VecIO<scalar_t>;
      auto* x = static_cast<const scalar_t*>(a.in[0]);
      auto* y = static_cast<scalar_t*>(a.out);
      const int64_t n = a.n, inner = a.inner;
      const bool streamed = streams_rows<L>(y, a.outer, n, x);
      over_rows<L, 1>(
          a.outer, n, inner, x,
          [=](int64_t begin, int64_t end) {
            const ExpScratch<L> scratch(Op::from_exponential ? n : 0,
                                        Op::from_exponential && streamed);
            auto first = first_peak<L>(x + begin * n, n);
            for (int64_t r = begin; r < end; ++r)
              softmax_row<Op, L>(x + r * n, Out<L, scalar_t>(y, r, n, streamed), scratch, n, first,
                                 r + 1 < end ? x + (r + 1) * n : nullptr);
            if (streamed) fence();
            scratch.free();
          },
          [=](int64_t o, int64_t i, int64_t count, typename L::real* memory) {
            const int64_t at = o * n * inner + i;
            softmax_columns<Op, L>(x + at, y + at, n, inner, count, memory);
          });
      return nullptr;
    });
  }
  static Error backward(const SoftmaxArgs& a) {
    return dispatch(a.dtype, [&](auto zero) -> Error {
      using scalar_t = decltype(zero);
      using L = VecIO<scalar_t>;
      auto* y = static_cast<const scalar_t*>(a.in[0]);
      auto* dy = static_cast<const scalar_t*>(a.in[1]);
      auto* dx = static_cast<scalar_t*>(a.out);
      const int64_t n = a.n, inner = a.inner;
      const bool streamed = dx != y && streams_rows<L>(dx, a.outer, n, dy);
      over_rows<L, 2>(
          a.outer, n, inner, y,
          [=](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r)
              softmax_row_backward<Op, L>(y + r * n, dy + r * n,
                                          Out<L, scalar_t>(dx, r, n, streamed), n);
            if (streamed) fence();
          },
          [=](int64_t o, int64_t i, int64_t count, typename L::real* memory) {
            const int64_t at = o * n * inner + i;
            softmax_columns_backward<Op, L>(y + at, dy + at, dx + at, n, inner, count, memory);
          });
      return nullptr;
    });
  }
  static constexpr SoftmaxKernel kernel{Op::name, &forward, &backward, Op::is_log};
};

using SoftmaxTable = Table<SoftmaxKernel, MakeSoftmax, Softmaxes>;

}  // namespace

extern constinit const KernelTable<SoftmaxKernel> softmax_kernels{SoftmaxTable::kernels,
                                                                  std::size(SoftmaxTable::kernels)};

}  // namespace fastops::CPU_CAPABILITY
