// Activations, alone and of a sum, and gates: forward, backward and second derivative.
#include "elementwise.h"

#include "../formulas/activations.h"
#include "../formulas/gates.h"
#include "../kernels/elementwise.h"
#include "column_sums.h"

namespace fastops::CPU_CAPABILITY {
namespace {

// ------------------------------------------------------------------------------------------------
// activations

template <int params, int inputs, class F>
Error activation(const ElementwiseArgs& a, F f) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using V = typename VecIO<scalar_t>::V;
    const Params<params, typename VecIO<scalar_t>::real> p(a.params);
    const Result<scalar_t> out[] = {{static_cast<scalar_t*>(a.out)}};
    Operand<scalar_t> in[inputs];
    for (int k = 0; k < inputs; ++k) in[k] = {static_cast<const scalar_t*>(a.in[k])};
    elementwise(a.n, out, in, [=](auto... x) { return with_params<params, V>(f, p.value, x...); });
    return nullptr;
  });
}

template <class Op>
struct MakeElementwise {
  static constexpr int params = count_params(Op::params);

  static Error forward(const ElementwiseArgs& a) {
    return activation<params, 1>(a, [](auto x, auto... p) { return Op::forward(x, p...); });
  }
  static Error backward(const ElementwiseArgs& a) {
    return activation<params, 2>(
        a, [](auto s, auto dy, auto... p) { return Op::backward(s, dy, p...); });
  }
  static Error second(const ElementwiseArgs& a) {
    return activation<params, 3>(a, [](auto s, auto dy, auto ddx, auto... p) {
      using T = decltype(s);
      using D = Dual<T>;
      return Op::backward(D(s, c<T>(1)), D(dy, c<T>(0)), D(p, c<T>(0))...).d * ddx;
    });
  }
  static constexpr bool (*output_question())(const double*) {
    if constexpr (requires { Op::output_will_do(0.0); }) {
      return [](const double* p) { return Op::output_will_do(p[0]); };
    } else {
      return nullptr;
    }
  }
  static constexpr ElementwiseKernel kernel{Op::name,  Op::params, Op::from_output,  &forward,
                                            &backward, &second,    output_question()};
};
using ElementwiseTable = Table<ElementwiseKernel, MakeElementwise, Activations>;

// ------------------------------------------------------------------------------------------------
// activations of a sum

template <class Op, int inputs, class F>
Error fused(const FusedArgs& a, F f) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    const Result<scalar_t> out[] = {{static_cast<scalar_t*>(a.out)}};
    Operand<scalar_t> in[inputs];
    for (int k = 0; k < inputs; ++k) in[k] = {static_cast<const scalar_t*>(a.in[k])};
    if (Op::broadcast) in[1].period = a.period;
    elementwise<Op::broadcast ? 0b10 : 0>(a.n, out, in, f);
    return nullptr;
  });
}

template <class Op>
struct MakeFused {
  static Error forward(const FusedArgs& a) {
    return fused<Op, 2>(a, [](auto x, auto t) { return Op::forward(x, t); });
  }
  static Error backward(const FusedArgs& a) {
    return fused<Op, 3>(a, [](auto x, auto t, auto dy) { return Op::backward(x, t, dy); });
  }
  static Error backward_summed(const FusedArgs& a) {
    return dispatch(a.dtype, [&](auto zero) -> Error {
      using scalar_t = decltype(zero);
      using L = VecIO<scalar_t>;
      using V = typename L::V;
      auto* out = static_cast<scalar_t*>(a.out);
      auto* x = static_cast<const scalar_t*>(a.in[0]);
      auto* t = static_cast<const scalar_t*>(a.in[1]);
      auto* dy = static_cast<const scalar_t*>(a.in[2]);
      typename L::real* const sums[] = {static_cast<typename L::real*>(a.sums)};
      const bool stream = a.period % L::size == 0 && streams<L>(out, a.n, x);
      sum_columns<L>(
          a.n / a.period, a.period, sums,
          [=](int64_t i, int64_t j, auto n, V(&v)[1][L::count]) {
            V b[L::count], g[L::count];
            L::load(x + i, n, v[0]);
            L::load(t + j, n, b);
            L::load(dy + i, n, g);
            for (int m = 0; m < L::count; ++m) v[0][m] = Op::backward(v[0][m], b[m], g[m]);
            L::store(out + i, n, v[0], stream);
          },
          [=](int64_t i) {
            __builtin_prefetch(x + i);
            __builtin_prefetch(dy + i);
          },
          stream);
      return nullptr;
    });
  }
  static constexpr FusedKernel make_kernel() {
    FusedKernel kernel{Op::name, Op::activation, Op::broadcast, &forward, nullptr, nullptr};
    if constexpr (Op::broadcast) kernel.backward = &backward, kernel.summed = &backward_summed;
    return kernel;
  }
  static constexpr FusedKernel kernel = make_kernel();
};
using FusedTable = Table<FusedKernel, MakeFused, Fused>;

// ------------------------------------------------------------------------------------------------
// gates

template <int inputs, int outputs, class F>
Error gate(const GateArgs& a, F f) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    Result<scalar_t> out[outputs];
    Operand<scalar_t> in[inputs];
    for (int m = 0; m < outputs; ++m)
      out[m] = {static_cast<scalar_t*>(a.out[m].data), a.inner, a.out[m].stride};
    for (int k = 0; k < inputs; ++k)
      in[k] = {static_cast<const scalar_t*>(a.in[k].data), a.inner, 1, a.in[k].stride};
    elementwise<(1u << inputs) - 1>(a.outer * a.inner, out, in, f);
    return nullptr;
  });
}

template <class Op>
struct MakeGate {
  static Error forward(const GateArgs& g) {
    return gate<2, 1>(g, [](auto a, auto b) { return Op::forward(a, b); });
  }
  static Error backward(const GateArgs& g) {
    return gate<3, 2>(g, [](auto a, auto b, auto dy) { return Op::backward(a, b, dy); });
  }
  static Error tangent(const GateArgs& g) {
    return gate<4, 1>(g,
                      [](auto a, auto b, auto u, auto v) { return gate_tangent<Op>(a, b, u, v); });
  }
  static Error second(const GateArgs& g) {
    return gate<5, 2>(
        g, [](auto a, auto b, auto dy, auto u, auto v) { return gate_second<Op>(a, b, dy, u, v); });
  }
  static constexpr GateKernel kernel{Op::name, &forward, &backward, &tangent, &second};
};
using GateTable = Table<GateKernel, MakeGate, Gates>;

}  // namespace

extern constinit const KernelTable<ElementwiseKernel> elementwise_kernels{
    ElementwiseTable::kernels, std::size(ElementwiseTable::kernels)};
extern constinit const KernelTable<FusedKernel> fused_kernels{FusedTable::kernels,
                                                              std::size(FusedTable::kernels)};
extern constinit const KernelTable<GateKernel> gate_kernels{GateTable::kernels,
                                                            std::size(GateTable::kernels)};

}  // namespace fastops::CPU_CAPABILITY
