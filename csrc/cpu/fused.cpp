// The elementwise loop of two inputs, of which the second may be one row, repeated.
#include "../formulas/fused.h"
#include "lanes.h"
#include "parallel.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread takes at least

// out[i] = f(in[0][i], in[1][i % period], in[2][i])
template <int inputs, class F>
Error fused(const FusedArgs& a, F f) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = Lanes<scalar_t>;
    using V = typename L::V;
    auto* out = static_cast<scalar_t*>(a.out);
    const scalar_t* in[inputs];
    for (int k = 0; k < inputs; ++k) in[k] = static_cast<const scalar_t*>(a.in[k]);
    const int64_t period = a.period;
    const bool stream = (period == a.n || period % L::size == 0) && streams<L>(out, a.n, in[0]);
    cpu::parallel_groups<L::size>(a.n, kGrain, [=](int64_t begin, int64_t end) {
      groups_beside<L::size>(begin, end, period, [&](int64_t i, int64_t j, auto count) {
        V x[inputs][L::count], y[L::count];
        for (int k = 0; k < inputs; ++k) L::load(in[k] + (k == 1 ? j : i), count, x[k]);
        for (int k = 0; k < L::count; ++k) {
          if constexpr (inputs == 2) y[k] = f(x[0][k], x[1][k]);
          if constexpr (inputs == 3) y[k] = f(x[0][k], x[1][k], x[2][k]);
        }
        L::leave(out + i, count, y, stream);
      });
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
  static constexpr FusedKernel backward_or_null() {
    if constexpr (Op::broadcast) return &backward;
    return nullptr;
  }
  static constexpr FusedRow row{Op::name, Op::activation, Op::broadcast, &forward, backward_or_null()};
};
using FusedTable = Table<FusedRow, MakeFused, Fused>;

}  // namespace

extern constinit const Rows<FusedRow> fused_rows{FusedTable::rows, std::size(FusedTable::rows)};

}  // namespace fastops::CPU_CAPABILITY
