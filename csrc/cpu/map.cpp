// The elementwise loop: out[i] = f(in0[i], in1[i], ...), for every activation, forward, backward and second derivative.
#include "../formulas/activations.h"
#include "lanes.h"
#include "parallel.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread takes at least

template <int params, int inputs, class F>
Error map(const MapArgs& a, F f) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = Lanes<scalar_t>;
    using V = typename L::V;
    const Params<params, typename L::real> p(a.params);
    auto* out = static_cast<scalar_t*>(a.out);
    const scalar_t* in[inputs];
    for (int k = 0; k < inputs; ++k) in[k] = static_cast<const scalar_t*>(a.in[k]);
    const int64_t total = a.n;
    const auto range = [=](int64_t begin, int64_t end, auto write) {
      groups<L::size>(begin, end, [&](int64_t i, auto n) {
        V x[inputs][L::count], y[L::count];
        for (int k = 0; k < inputs; ++k) L::load(in[k] + i, n, x[k]);
        for (int k = 0; k < L::count; ++k) {
          if constexpr (inputs == 1) y[k] = with_params<params, V>(f, p.value, x[0][k]);
          if constexpr (inputs == 2) y[k] = with_params<params, V>(f, p.value, x[0][k], x[1][k]);
          if constexpr (inputs == 3)
            y[k] = with_params<params, V>(f, p.value, x[0][k], x[1][k], x[2][k]);
        }
        write(out + i, n, y);
      });
    };
    if (streams<L>(out, total, in[0])) {
      // Threads are given whole groups, so that every group is aligned.
      cpu::parallel((total + L::size - 1) / L::size, kGrain, [=](int64_t begin, int64_t end) {
        const int64_t last = end * L::size < total ? end * L::size : total;
        range(begin * L::size, last, [](scalar_t* to, auto n, auto& y) {
          if (n == L::size) {
            L::stream(to, y);
          } else {
            L::store(to, n, y);
          }
        });
        fence();
      });
    } else {
      cpu::parallel(total, kGrain, [=](int64_t begin, int64_t end) {
        range(begin, end, [](scalar_t* to, auto n, auto& y) { L::store(to, n, y); });
      });
    }
    return nullptr;
  });
}

template <class Op>
struct MakeMap {
  static constexpr int params = count_params(Op::params);

  static Error forward(const MapArgs& a) {
    return map<params, 1>(a, [](auto x, auto... p) { return Op::forward(x, p...); });
  }
  static Error backward(const MapArgs& a) {
    return map<params, 2>(a, [](auto s, auto dy, auto... p) { return Op::backward(s, dy, p...); });
  }
  static Error second(const MapArgs& a) {
    return map<params, 3>(a, [](auto s, auto dy, auto ddx, auto... p) {
      using T = decltype(s);
      using D = Dual<T>;
      return Op::backward(D(s, c<T>(1)), D(dy, c<T>(0)), D(p, c<T>(0))...).d * ddx;
    });
  }
  static constexpr MapRow row{Op::name, Op::params, Op::from_output, &forward, &backward, &second};
};
using MapTable = Table<MapRow, MakeMap, Activations>;

}  // namespace

extern constinit const Rows<MapRow> map_rows{MapTable::rows, std::size(MapTable::rows)};

}  // namespace fastops::CPU_CAPABILITY
