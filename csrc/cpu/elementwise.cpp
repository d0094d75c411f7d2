// The elementwise loop: out[i] = f(in0[i], in1[i], ...), for every activation, forward, backward
// and second derivative.
#include <cstring>

#include "../formulas/activations.h"
#include "../kernels/elementwise.h"
#include "parallel.h"
#include "vec_io.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread takes at least

template <int params, int inputs, class F>
Error map(const ElementwiseArgs& a, F f) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = VecIO<scalar_t>;
    using V = typename L::V;
    const Params<params, typename L::real> p(a.params);
    auto* out = static_cast<scalar_t*>(a.out);
    const scalar_t* in[inputs];
    for (int k = 0; k < inputs; ++k) in[k] = static_cast<const scalar_t*>(a.in[k]);
    const int64_t total = a.n;
    const bool stream = streams<L>(out, total, in[0]);
    cpu::parallel_vectors<L::size>(total, kGrain, [=](int64_t begin, int64_t end) {
      constexpr std::integral_constant<int64_t, L::size> full;
      const auto run = [&](const scalar_t* const(&from)[inputs], scalar_t* to, int64_t count) {
        for (int64_t i = 0; i < count; i += L::size) {
          V x[inputs][L::count], y[L::count];
          for (int k = 0; k < inputs; ++k) L::load(from[k] + i, full, x[k]);
          for (int k = 0; k < L::count; ++k) {
            if constexpr (inputs == 1) y[k] = with_params<params, V>(f, p.value, x[0][k]);
            if constexpr (inputs == 2) y[k] = with_params<params, V>(f, p.value, x[0][k], x[1][k]);
            if constexpr (inputs == 3)
              y[k] = with_params<params, V>(f, p.value, x[0][k], x[1][k], x[2][k]);
          }
          L::store(to + i, full, y, stream);
        }
      };
      const scalar_t* from[inputs];
      for (int k = 0; k < inputs; ++k) from[k] = in[k] + begin;
      scalar_t* to = out + begin;
      int64_t whole = (end - begin) / L::size * L::size;
      const int64_t rest = end - begin - whole;
      alignas(64) scalar_t padded[inputs + 1][L::size];
      // The full vectors, then what is left as one more, in a buffer: so the formula is compiled
      // once, not once for each.
      for (bool last = false;; last = true) {
        run(from, to, whole);
        if (last || rest == 0) break;
        for (int k = 0; k < inputs; ++k) {
          memset(padded[k], 0, sizeof padded[k]);
          memcpy(padded[k], from[k] + whole, static_cast<size_t>(rest) * sizeof(scalar_t));
          from[k] = padded[k];
        }
        to = padded[inputs];
        whole = L::size;
      }
      if (rest)
        memcpy(out + (end - rest), padded[inputs], static_cast<size_t>(rest) * sizeof(scalar_t));
      if (stream) fence();
    });
    return nullptr;
  });
}

template <class Op>
struct MakeElementwise {
  static constexpr int params = count_params(Op::params);

  static Error forward(const ElementwiseArgs& a) {
    return map<params, 1>(a, [](auto x, auto... p) { return Op::forward(x, p...); });
  }
  static Error backward(const ElementwiseArgs& a) {
    return map<params, 2>(a, [](auto s, auto dy, auto... p) { return Op::backward(s, dy, p...); });
  }
  static Error second(const ElementwiseArgs& a) {
    return map<params, 3>(a, [](auto s, auto dy, auto ddx, auto... p) {
      using T = decltype(s);
      using D = Dual<T>;
      return Op::backward(D(s, c<T>(1)), D(dy, c<T>(0)), D(p, c<T>(0))...).d * ddx;
    });
  }
  static constexpr ElementwiseKernel row{Op::name, Op::params, Op::from_output,
                                         &forward, &backward,  &second};
};
using ElementwiseTable = Table<ElementwiseKernel, MakeElementwise, Activations>;

}  // namespace

extern constinit const KernelTable<ElementwiseKernel> elementwise_kernels{
    ElementwiseTable::rows, std::size(ElementwiseTable::rows)};

}  // namespace fastops::CPU_CAPABILITY
