// Elementwise losses and their sums: values, total, first and second derivatives. A sum is taken in
// two stages over chunks whose order n alone decides, without atomics, so that it has the same bits
// on every device and in every run.
#include "../formulas/losses.h"
#include "../kernels/loss.h"
#include "elementwise.cuh"
#include "team.cuh"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;  // of a block that sums

// ------------------------------------------------------------------------------------------------
// values and derivatives

template <class Op>
constexpr int inputs_of = 2 + count_tensors(Op::params);  // x, t and, for some, w

template <class Op>
struct Value {
  static constexpr int inputs = inputs_of<Op>, outputs = 1, params = count_params(Op::params);
  static constexpr unsigned broadcast = inputs == 3 ? 0b100 : 0;  // w
  template <class T, class... P>
  static FASTOPS_FN T apply(T x, T t, P... p) {
    return Op::value(x, t, p...);
  }
};
// The same, and d0 besides, where there is room for it.
template <class Op>
struct ValueAndSlope {
  static constexpr int inputs = inputs_of<Op>, outputs = 2, params = count_params(Op::params);
  template <class T, class... P>
  static FASTOPS_FN Pair<T> apply(T x, T t, P... p) {
    return value_and_slope<Op>(x, t, p...);
  }
};
// Of a sum, in which d0 is written past the loop.
template <class Op, class scalar_t>
struct SummedWithSlope {
  static constexpr int inputs = inputs_of<Op>, outputs = 1, params = count_params(Op::params);
  template <class real>
  struct Functor {
    Params<params, real> p;
    scalar_t* slope;

    template <int n>
    __device__ __forceinline__ void operator()(int64_t i, const real (&x)[inputs][n],
                                               real (&y)[1][n]) const {
      real d[n];
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const auto both = apply<ValueAndSlope<Op>>(p, x[0][k], x[1][k]);
        y[0][k] = both.v[0];
        d[k] = both.v[1];
      }
      if constexpr (n == 1) {
        store(slope + i, static_cast<scalar_t>(d[0]));
      } else {
        store_wide(slope + i, d);
      }
    }
  };
};
template <class Op>
struct D0 {
  template <class T, class... P>
  static FASTOPS_FN T apply(int, T x, T t, P... p) {
    return Op::d0(x, t, p...);
  }
};
template <class Op>
struct D1 {
  template <class T, class... P>
  static FASTOPS_FN T apply(int, T x, T t, P... p) {
    return Op::d1(x, t, p...);
  }
};
template <class Op>
struct Second {
  template <class T, class... P>
  static FASTOPS_FN T apply(int to_target, T x, T t, P... p) {
    return second_derivative<Op>(to_target, x, t, p...);
  }
};

// D<Op> times the upstream gradient, which is the last input, and `factor`: the formula's slope and
// the reduction's scale.
template <template <class> class D, class Op>
struct Derivative {
  static constexpr int inputs = inputs_of<Op> + 1, outputs = 1, params = count_params(Op::params);
  static constexpr unsigned broadcast = inputs == 4 ? 0b1100 : 0b100;  // w and the gradient

  template <class real>
  struct Functor {
    Params<params, real> p;
    real factor;
    int to_target;

    template <int n>
    __device__ __forceinline__ void operator()(int64_t, const real (&x)[inputs][n],
                                               real (&y)[1][n]) const {
#pragma unroll
      for (int k = 0; k < n; ++k) {
        real d;
        if constexpr (inputs == 3) d = apply<D<Op>>(p, to_target, x[0][k], x[1][k]);
        if constexpr (inputs == 4) d = apply<D<Op>>(p, to_target, x[0][k], x[1][k], x[2][k]);
        y[0][k] = d * (x[inputs - 1][k] * factor);
      }
    }
  };
};

template <class scalar_t, size_t count>
void set_inputs(const LossArgs& a, int tensors, std::array<Operand<scalar_t>, count>& in) {
  for (int j = 0; j < tensors; ++j) in[j].p = static_cast<const scalar_t*>(a.in[j]);
  if (tensors == 3) in[2].period = a.period;
}

template <class Op>
Error values(const LossArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using F = Value<Op>;
    std::array<Operand<scalar_t>, F::inputs> in;
    set_inputs(a, F::inputs, in);
    if constexpr (saves_slope<Op>())
      if (a.slope)
        return launch_elementwise<ValueAndSlope<Op>, scalar_t>(
            a.n, {static_cast<scalar_t*>(a.out), static_cast<scalar_t*>(a.slope)}, in,
            {Params<F::params, real_of<scalar_t>>(a.params)}, a.stream);
    return launch_elementwise<F, scalar_t>(a.n, {static_cast<scalar_t*>(a.out)}, in,
                                           {Params<F::params, real_of<scalar_t>>(a.params)},
                                           a.stream);
  });
}

template <template <class> class D, class Op>
Error derivative(const LossArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using real = real_of<scalar_t>;
    using F = Derivative<D, Op>;
    std::array<Operand<scalar_t>, F::inputs> in;
    set_inputs(a, F::inputs - 1, in);
    Operand<scalar_t>& grad = in[F::inputs - 1];
    grad.p = static_cast<const scalar_t*>(a.grad);
    if (!a.grad || a.grad_is_scalar) grad.period = 1;
    const real factor =
        static_cast<real>(slope_of<Op>()) * (a.grad ? static_cast<real>(a.scale) : real(1));
    return launch_elementwise<F, scalar_t>(a.n, {static_cast<scalar_t*>(a.out)}, in,
                                           {Params<F::params, real>(a.params), factor, a.to_target},
                                           a.stream);
  });
}

// ------------------------------------------------------------------------------------------------
// kernels: sums

// What becomes of a finished sum.
template <class real>
struct Finish {
  real* out;
  const real* divisor;
  double scale;
  __device__ __forceinline__ void operator()(double sum) const {
    sum *= scale;
    if (divisor) sum /= static_cast<double>(load(divisor));
    store(out, static_cast<real>(sum));
  }
};

// One block per chunk. A thread takes the same elements in the same order whatever the alignment,
// adds them in real, and the threads are added in double. A lone chunk is finished at once.
template <class F, class scalar_t>
__global__ void __launch_bounds__(kThreads, kResident)
    chunk_kernel(const ElementwiseCall<F, scalar_t> __grid_constant__ call, double* partial,
                 Finish<real_of<scalar_t>> finish) {
  using real = real_of<scalar_t>;
  constexpr int size = pack_size<scalar_t>, step = kThreads * size;
  constexpr int slots = kDeviceLossChunk / step;
  static_assert(slots * step == kDeviceLossChunk);
  const int64_t n = call.span.n, first = blockIdx.x * kDeviceLossChunk + threadIdx.x * size;
  BroadcastState<scalar_t> state[F::inputs];
  start_broadcast(call, state, first);
  Reader<F, scalar_t, size, slots> reader(call, state);
  const auto whole = [&](int64_t i) { return call.span.packs > 0 && i + size <= n; };
#pragma unroll
  for (int m = 0; m < slots; ++m)
    if (whole(first + m * step)) reader.load_group(m, first + m * step);
  real sum = 0;
#pragma unroll
  for (int m = 0; m < slots; ++m) {
    const int64_t i = first + m * step;
    real few = 0;  // one long sum would drift where values are alike
    if (whole(i)) {
      real x[F::inputs][size], y[1][size];
      convert(reader.raw[m], x);
      call.functor(i, x, y);
#pragma unroll
      for (int k = 0; k < size; ++k) few += y[0][k];
    } else {
#pragma unroll 1
      for (int64_t each = i; each < n && each < i + size; ++each) {
        BroadcastState<scalar_t> at[F::inputs];
        start_broadcast(call, at, each);
        Reader<F, scalar_t, 1, 1> single(call, at);
        single.load_group(0, each);
        real x[F::inputs][1], y[1][1];
        convert(single.raw[0], x);
        call.functor(each, x, y);
        few += y[0][0];
      }
    }
    sum += few;
  }
  const double total = Team<kThreads>().sum(static_cast<double>(sum));
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    finish(total);
  } else {
    store(partial + blockIdx.x, total);
  }
}

template <class real>
__global__ void __launch_bounds__(kThreads, kResident)
    join_kernel(int64_t chunks, const double* partial, Finish<real> finish) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < chunks; k += kThreads) sum += load(partial + k);
  sum = Team<kThreads>().sum(sum);
  if (threadIdx.x == 0) finish(sum);
}

// ------------------------------------------------------------------------------------------------
// launchers

template <class F, class scalar_t>
Error total_of(const LossArgs& a, const Functor<F, real_of<scalar_t>>& functor) {
  using real = real_of<scalar_t>;
  std::array<Operand<scalar_t>, F::inputs> in;
  set_inputs(a, F::inputs, in);
  auto call = elementwise_call<F, scalar_t>(a.n, {nullptr}, in, functor);
  set_steps(call, kThreads * pack_size<scalar_t>, 1);
  auto* partial = static_cast<double*>(a.workspace);
  const Finish<real> finish{static_cast<real*>(a.out), static_cast<const real*>(a.divisor),
                            a.scale};
  const int64_t chunks = (a.n + kDeviceLossChunk - 1) / kDeviceLossChunk;
  if (chunks > 0) {
    const Error error =
        launch(chunk_kernel<F, scalar_t>, chunks, kThreads, a.stream, call, partial, finish);
    if (error || chunks == 1) return error;
  }
  return launch(join_kernel<real>, 1, kThreads, a.stream, chunks, partial, finish);
}

template <class F>
Error total(const LossArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    return total_of<F, scalar_t>(a, {Params<F::params, real_of<scalar_t>>(a.params)});
  });
}

template <class Op>
Error loss_total(const LossArgs& a) {
  if constexpr (saves_slope<Op>()) {
    if (a.slope)
      return dispatch(a.dtype, [&](auto zero) -> Error {
        using scalar_t = decltype(zero);
        return total_of<SummedWithSlope<Op, scalar_t>, scalar_t>(
            a, {Params<count_params(Op::params), real_of<scalar_t>>(a.params),
                static_cast<scalar_t*>(a.slope)});
      });
  }
  return total<Value<Op>>(a);
}

struct Identity {
  static constexpr int inputs = 1, outputs = 1, params = 0;
  template <class T>
  static FASTOPS_FN T apply(T x) {
    return x;
  }
};

// ------------------------------------------------------------------------------------------------
// table

template <class Op>
struct MakeLoss {
  static constexpr LossKernel kernel{Op::name,
                                     Op::params,
                                     &values<Op>,
                                     &loss_total<Op>,
                                     &derivative<D0, Op>,
                                     &derivative<D1, Op>,
                                     &derivative<Second, Op>,
                                     domain_of<Op>().low,
                                     domain_of<Op>().high,
                                     saves_slope<Op>()};
};
template <>
struct MakeLoss<Identity> {
  static constexpr LossKernel kernel{"sum",   "", nullptr, &total<Identity>, nullptr, nullptr,
                                     nullptr, 0,  0};
};

template <class... Ops>
auto with_sum(List<Ops...>) -> List<Ops..., Identity>;
using LossTable = Table<LossKernel, MakeLoss, decltype(with_sum(Losses{}))>;

}  // namespace

extern constinit const KernelTable<LossKernel> loss_kernels{LossTable::kernels,
                                                            std::size(LossTable::kernels)};

}  // namespace fastops::cuda
