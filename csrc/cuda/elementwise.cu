// Activations, alone and of a sum, and gates: forward, backward and second derivatives.
#include "../formulas/activations.h"
#include "../formulas/gates.h"
#include "../kernels/elementwise.h"
#include "column_sums.cuh"
#include "elementwise.cuh"

namespace fastops::cuda {
namespace {

// ------------------------------------------------------------------------------------------------
// activations

template <class Op>
struct Forward {
  static constexpr int inputs = 1, outputs = 1, params = count_params(Op::params);
  template <class T, class... P>
  static FASTOPS_FN T apply(T x, P... p) {
    return Op::forward(x, p...);
  }
};
template <class Op>
struct Backward {
  static constexpr int inputs = 2, outputs = 1, params = count_params(Op::params);
  template <class T, class... P>
  static FASTOPS_FN T apply(T s, T dy, P... p) {
    return Op::backward(s, dy, p...);
  }
};
template <class Op>
struct Second {
  static constexpr int inputs = 3, outputs = 1, params = count_params(Op::params);
  template <class T, class... P>
  static FASTOPS_FN T apply(T s, T dy, T ddx, P... p) {
    using D = Dual<T>;
    return Op::backward(D(s, c<T>(1)), D(dy, c<T>(0)), D(p, c<T>(0))...).d * ddx;
  }
};

template <class F>
Error activation(const ElementwiseArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    std::array<Operand<scalar_t>, F::inputs> in;
    for (int j = 0; j < F::inputs; ++j) in[j].p = static_cast<const scalar_t*>(a.in[j]);
    return launch_elementwise<F, scalar_t>(a.n, {static_cast<scalar_t*>(a.out)}, in,
                                           {Params<F::params, real_of<scalar_t>>(a.params)},
                                           a.stream);
  });
}

template <class Op>
struct MakeElementwise {
  static constexpr ElementwiseKernel kernel{Op::name,
                                            Op::params,
                                            Op::from_output,
                                            &activation<Forward<Op>>,
                                            &activation<Backward<Op>>,
                                            &activation<Second<Op>>};
};
using ElementwiseTable = Table<ElementwiseKernel, MakeElementwise, Activations>;

// ------------------------------------------------------------------------------------------------
// activations of a sum

template <class Op>
struct FusedForward {
  static constexpr int inputs = 2, outputs = 1, params = 0;
  static constexpr unsigned broadcast = Op::broadcast ? 0b10 : 0;
  template <class T>
  static FASTOPS_FN T apply(T x, T t) {
    return Op::forward(x, t);
  }
};
template <class Op>
struct FusedBackward {
  static constexpr int inputs = 3, outputs = 1, params = 0;
  static constexpr unsigned broadcast = Op::broadcast ? 0b10 : 0;
  template <class T>
  static FASTOPS_FN T apply(T x, T t, T dy) {
    return Op::backward(x, t, dy);
  }
};

template <class F>
Error fused(const FusedArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    std::array<Operand<scalar_t>, F::inputs> in;
    for (int j = 0; j < F::inputs; ++j) in[j].p = static_cast<const scalar_t*>(a.in[j]);
    in[1].period = a.period;
    return launch_elementwise<F, scalar_t>(a.n, {static_cast<scalar_t*>(a.out)}, in,
                                           {Params<0, real_of<scalar_t>>(nullptr)}, a.stream);
  });
}

// The gradient to a row that was added is the sum of that to the rows.
template <class Op>
struct FusedSummed {
  static constexpr int quantities = 1;
  template <class scalar_t>
  struct Rows {
    scalar_t* dx;
    const scalar_t *x, *t, *dy;  // t: one row for all
  };
  template <class scalar_t, int n>
  struct Column {
    using real = real_of<scalar_t>;
    struct Loaded {
      Raw<scalar_t, n> x, dy;
    };
    const Rows<scalar_t>& of;
    real t[n];
    __device__ __forceinline__ Column(const Rows<scalar_t>& of, int64_t left) : of(of) {
      load_columns(of.t + left, t);
    }
    __device__ __forceinline__ Loaded load(int64_t i) const {
      Loaded loaded;
      loaded.x.load_from(of.x + i);
      loaded.dy.load_from(of.dy + i);
      return loaded;
    }
    __device__ __forceinline__ void apply(const Loaded& loaded, int64_t i,
                                          real (&sum)[1][n]) const {
      real x[n], dy[n];
      loaded.x.values(x);
      loaded.dy.values(dy);
#pragma unroll
      for (int k = 0; k < n; ++k) sum[0][k] += x[k] = Op::backward(x[k], t[k], dy[k]);
      store_columns(of.dx + i, x);
    }
  };
};

template <class Op>
Error fused_summed(const FusedArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using F = FusedSummed<Op>;
    const typename F::template Rows<scalar_t> rows{
        static_cast<scalar_t*>(a.out), static_cast<const scalar_t*>(a.in[0]),
        static_cast<const scalar_t*>(a.in[1]), static_cast<const scalar_t*>(a.in[2])};
    return launch_summed<F, pack_size<scalar_t>, scalar_t>(
        a.n, a.period, aligned(rows.dx, rows.x, rows.t, rows.dy), rows,
        {static_cast<real_of<scalar_t>*>(a.sums)}, a.stream);
  });
}

template <class Op>
struct MakeFused {
  static constexpr FusedKernel make_kernel() {
    FusedKernel kernel{Op::name, Op::activation, Op::broadcast, &fused<FusedForward<Op>>,
                       nullptr,  nullptr};
    if constexpr (Op::broadcast)
      kernel.backward = &fused<FusedBackward<Op>>, kernel.summed = &fused_summed<Op>;
    return kernel;
  }
  static constexpr FusedKernel kernel = make_kernel();
};
using FusedTable = Table<FusedKernel, MakeFused, Fused>;

// ------------------------------------------------------------------------------------------------
// gates

template <class Op>
struct GateForward {
  static constexpr int inputs = 2, outputs = 1, params = 0;
  static constexpr bool strided = true;
  template <class T>
  static FASTOPS_FN T apply(T a, T b) {
    return Op::forward(a, b);
  }
};
template <class Op>
struct GateBackward {
  static constexpr int inputs = 3, outputs = 2, params = 0;
  static constexpr bool strided = true;
  template <class T>
  static FASTOPS_FN Pair<T> apply(T a, T b, T dy) {
    return Op::backward(a, b, dy);
  }
};
template <class Op>
struct GateTangent {
  static constexpr int inputs = 4, outputs = 1, params = 0;
  static constexpr bool strided = true;
  template <class T>
  static FASTOPS_FN T apply(T a, T b, T u, T v) {
    return gate_tangent<Op>(a, b, u, v);
  }
};
template <class Op>
struct GateSecond {
  static constexpr int inputs = 5, outputs = 2, params = 0;
  static constexpr bool strided = true;
  template <class T>
  static FASTOPS_FN Pair<T> apply(T a, T b, T dy, T u, T v) {
    return gate_second<Op>(a, b, dy, u, v);
  }
};

template <class F>
Error gate(const GateArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    std::array<scalar_t*, F::outputs> out;
    std::array<Operand<scalar_t>, F::inputs> in;
    RowStrides<F> strides{a.inner};
    for (int o = 0; o < F::outputs; ++o) {
      out[o] = static_cast<scalar_t*>(a.out[o].data);
      strides.out[o] = a.out[o].stride;
    }
    for (int j = 0; j < F::inputs; ++j) {
      in[j].p = static_cast<const scalar_t*>(a.in[j].data);
      strides.in[j] = a.in[j].stride;
    }
    return launch_elementwise<F, scalar_t>(
        a.outer * a.inner, out, in, {Params<0, real_of<scalar_t>>(nullptr)}, a.stream, strides);
  });
}

template <class Op>
struct MakeGate {
  static constexpr GateKernel kernel{Op::name, &gate<GateForward<Op>>, &gate<GateBackward<Op>>,
                                     &gate<GateTangent<Op>>, &gate<GateSecond<Op>>};
};
using GateTable = Table<GateKernel, MakeGate, Gates>;

}  // namespace

// ------------------------------------------------------------------------------------------------
// tables

extern constinit const KernelTable<ElementwiseKernel> elementwise_kernels{
    ElementwiseTable::kernels, std::size(ElementwiseTable::kernels)};
extern constinit const KernelTable<FusedKernel> fused_kernels{FusedTable::kernels,
                                                              std::size(FusedTable::kernels)};
extern constinit const KernelTable<GateKernel> gate_kernels{GateTable::kernels,
                                                            std::size(GateTable::kernels)};

}  // namespace fastops::cuda
