// The elementwise loop of two inputs, of which the second may be one row, repeated.
#include "../formulas/fused.h"
#include "../kernels/elementwise.h"
#include "parallel.h"
#include "vec_io.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 16384;   // elements a thread takes at least
constexpr int64_t kColumns = 4096;  // whose sums stay in the first-level cache
constexpr int64_t kAhead = 32;      // vectors

// out[i] = f(in[0][i], in[1][i % period], in[2][i])
template <int inputs, class F>
Error fused(const FusedArgs& a, F f) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = VecIO<scalar_t>;
    using V = typename L::V;
    auto* out = static_cast<scalar_t*>(a.out);
    const scalar_t* in[inputs];
    for (int k = 0; k < inputs; ++k) in[k] = static_cast<const scalar_t*>(a.in[k]);
    const int64_t period = a.period;
    const bool stream = (period == a.n || period % L::size == 0) && streams<L>(out, a.n, in[0]);
    cpu::parallel_vectors<L::size>(a.n, kGrain, [=](int64_t begin, int64_t end) {
      for_each_vector_beside<L::size>(begin, end, period, [&](int64_t i, int64_t j, auto count) {
        V x[inputs][L::count], y[L::count];
        for (int k = 0; k < inputs; ++k) L::load(in[k] + (k == 1 ? j : i), count, x[k]);
        for (int k = 0; k < L::count; ++k) {
          if constexpr (inputs == 2) y[k] = f(x[0][k], x[1][k]);
          if constexpr (inputs == 3) y[k] = f(x[0][k], x[1][k], x[2][k]);
        }
        L::store(out + i, count, y, stream);
      });
      if (stream) fence();
    });
    return nullptr;
  });
}

// The same of three inputs, strip by strip, and the sums of out over the rows of each.
template <class F>
Error summed(const FusedArgs& a, F f) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = VecIO<scalar_t>;
    using V = typename L::V;
    using real = typename L::real;
    auto* out = static_cast<scalar_t*>(a.out);
    auto* x = static_cast<const scalar_t*>(a.in[0]);
    auto* t = static_cast<const scalar_t*>(a.in[1]);
    auto* dy = static_cast<const scalar_t*>(a.in[2]);
    auto* sums = static_cast<real*>(a.sums);
    const int64_t period = a.period, rows = a.n / period, strips = row_blocks_of(rows);
    const int64_t across = (period + kColumns - 1) / kColumns,
                  each = kRowBlock * (period < kColumns ? period : kColumns);
    const bool stream = period % L::size == 0 && streams<L>(out, a.n, x);
    cpu::parallel(strips * across, kGrain / each + 1, [=](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t s = k / across, left = k % across * kColumns,
                      right = left + kColumns < period ? left + kColumns : period;
        const int64_t last = (s + 1) * kRowBlock < rows ? (s + 1) * kRowBlock : rows;
        alignas(64) real sum[kColumns];
        for (int64_t j = 0; j < right - left; ++j) sum[j] = 0;
        for (int64_t r = s * kRowBlock; r < last; ++r) {
          const int64_t row = r * period;
          for_each_vector<L::size>(left, right, [&](int64_t j, auto count) {
            V v[L::count], b[L::count], g[L::count];
            __builtin_prefetch(
                x + row + j +
                kAhead * L::size);  // the sums take turns with what a processor would foresee
            __builtin_prefetch(dy + row + j + kAhead * L::size);
            L::load(x + row + j, count, v);
            L::load(t + j, count, b);
            L::load(dy + row + j, count, g);
            for (int m = 0; m < L::count; ++m) v[m] = f(v[m], b[m], g[m]);
            add_real<L>(sum + (j - left), count, v);
            L::store(out + row + j, count, v, stream);
          });
        }
        for (int64_t j = left; j < right; ++j) sums[s * period + j] = sum[j - left];
      }
      if (stream) fence();
    });
    return nullptr;
  });
}

template <class Op>
struct MakeFused {
  static Error forward(const FusedArgs& a) {
    return fused<2>(a, [](auto x, auto t) { return Op::forward(x, t); });
  }
  static Error backward(const FusedArgs& a) {
    return fused<3>(a, [](auto x, auto t, auto dy) { return Op::backward(x, t, dy); });
  }
  static Error backward_summed(const FusedArgs& a) {
    return summed(a, [](auto x, auto t, auto dy) { return Op::backward(x, t, dy); });
  }
  static constexpr FusedKernel row_of() {
    FusedKernel row{Op::name, Op::activation, Op::broadcast, &forward, nullptr, nullptr};
    if constexpr (Op::broadcast) row.backward = &backward, row.summed = &backward_summed;
    return row;
  }
  static constexpr FusedKernel row = row_of();
};
using FusedTable = Table<FusedKernel, MakeFused, Fused>;

}  // namespace

extern constinit const KernelTable<FusedKernel> fused_kernels{FusedTable::rows,
                                                              std::size(FusedTable::rows)};

}  // namespace fastops::CPU_CAPABILITY
