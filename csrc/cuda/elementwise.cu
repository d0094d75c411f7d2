// The elementwise loop: out[i] = f(in0[i], in1[i], ...), for every activation, forward, backward
// and second derivative.
#include "../formulas/activations.h"
#include "../kernels/elementwise.h"
#include "launch.cuh"
#include "pack.cuh"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;

// ------------------------------------------------------------------------------------------------
// kernels

template <class scalar_t, int inputs>
struct Inputs {
  const scalar_t* p[inputs];
};

// out may be in[0]: no __restrict__.
template <class F, class scalar_t, int inputs, int params>
__global__ void __launch_bounds__(kThreads, kResident)
    map_kernel(AlignedSpan cut, scalar_t* out, Inputs<scalar_t, inputs> in,
               Params<params, real_of<scalar_t>> p) {
  using real = real_of<scalar_t>;
  constexpr int size = pack_size<scalar_t>;
  const auto f = [&](const real(&x)[inputs]) {
    if constexpr (inputs == 1) return apply<F>(p, x[0]);
    if constexpr (inputs == 2) return apply<F>(p, x[0], x[1]);
    if constexpr (inputs == 3) return apply<F>(p, x[0], x[1], x[2]);
  };
  for_each_pack<size>(
      cut, int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads,
      [&](int64_t i) {
        real x[inputs][size], y[size];
#pragma unroll
        for (int j = 0; j < inputs; ++j) load_wide(in.p[j] + i, x[j]);
#pragma unroll
        for (int k = 0; k < size; ++k) {
          real each[inputs];
#pragma unroll
          for (int j = 0; j < inputs; ++j) each[j] = x[j][k];
          y[k] = f(each);
        }
        store_wide(out + i, y);
      },
      [&](int64_t i) {
        real x[inputs];
#pragma unroll
        for (int j = 0; j < inputs; ++j) x[j] = static_cast<real>(load(in.p[j] + i));
        store(out + i, static_cast<scalar_t>(f(x)));
      });
}

// ------------------------------------------------------------------------------------------------
// launchers

template <class F, int inputs, int params>
Error map(const ElementwiseArgs& a) {
  if (a.n == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    constexpr int size = pack_size<scalar_t>;
    auto* out = static_cast<scalar_t*>(a.out);
    Inputs<scalar_t, inputs> in;
    for (int j = 0; j < inputs; ++j) in.p[j] = static_cast<const scalar_t*>(a.in[j]);
    const AlignedSpan whole =
        aligned_span(a.n, size, out, in.p[0], in.p[inputs > 1], in.p[inputs - 1]);
    const int64_t items = std::max(whole.packs, whole.n - whole.packs * size);
    return launch(map_kernel<F, scalar_t, inputs, params>, grid_for(items, kThreads), kThreads,
                  a.stream, whole, out, in, Params<params, real_of<scalar_t>>(a.params));
  });
}

template <class Op>
struct Forward {
  template <class T, class... P>
  static FASTOPS_FN T apply(T x, P... p) {
    return Op::forward(x, p...);
  }
};
template <class Op>
struct Backward {
  template <class T, class... P>
  static FASTOPS_FN T apply(T s, T dy, P... p) {
    return Op::backward(s, dy, p...);
  }
};
template <class Op>
struct Second {
  template <class T, class... P>
  static FASTOPS_FN T apply(T s, T dy, T ddx, P... p) {
    using D = Dual<T>;
    return Op::backward(D(s, c<T>(1)), D(dy, c<T>(0)), D(p, c<T>(0))...).d * ddx;
  }
};

// ------------------------------------------------------------------------------------------------
// table

template <class Op>
struct MakeElementwise {
  static constexpr int params = count_params(Op::params);
  static constexpr ElementwiseKernel row{Op::name,
                                         Op::params,
                                         Op::from_output,
                                         &map<Forward<Op>, 1, params>,
                                         &map<Backward<Op>, 2, params>,
                                         &map<Second<Op>, 3, params>};
};
using ElementwiseTable = Table<ElementwiseKernel, MakeElementwise, Activations>;

}  // namespace

extern constinit const KernelTable<ElementwiseKernel> elementwise_kernels{
    ElementwiseTable::rows, std::size(ElementwiseTable::rows)};
extern constinit const KernelTable<GateKernel> gate_kernels{nullptr, 0};

}  // namespace fastops::cuda
