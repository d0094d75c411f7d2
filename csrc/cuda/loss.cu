// Elementwise losses and their sums: values, total, first and second derivatives. A sum is taken in
// two stages over chunks whose order n alone decides, without atomics, so that it has the same bits
// on every device and in every run.
#include "../formulas/losses.h"
#include "../kernels/loss.h"
#include "launch.cuh"
#include "pack.cuh"
#include "team.cuh"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;

// ------------------------------------------------------------------------------------------------
// kernels: each element

template <class scalar_t>
struct EachArgs {
  AlignedSpan cut;
  scalar_t* out;
  const scalar_t *x, *t, *w, *grad;  // grad: null, one value, or (each_grad) n of them
  int64_t period;                    // of w, where there are three inputs
  bool wide_w, each_grad;
  real_of<scalar_t> scale;
  int to_target;
};

// F of one to three inputs; where it is one of several derivatives, of `to_target` as well.
template <class F, int inputs, class real, int params>
__device__ __forceinline__ real value_of(const Params<params, real>& p, real x,
                                         [[maybe_unused]] real t, [[maybe_unused]] real w,
                                         [[maybe_unused]] int to_target = 0) {
  if constexpr (requires { typename F::of_several; }) {
    if constexpr (inputs == 2) return apply<F>(p, to_target, x, t);
    if constexpr (inputs == 3) return apply<F>(p, to_target, x, t, w);
  } else {
    if constexpr (inputs == 1) return apply<F>(p, x);
    if constexpr (inputs == 2) return apply<F>(p, x, t);
    if constexpr (inputs == 3) return apply<F>(p, x, t, w);
  }
}

// out[i] = F(x, t, ...) times its slope, and times scale and the gradient where there is one
template <class F, class scalar_t, int inputs, int params>
__global__ void __launch_bounds__(kThreads, kResident)
    each_kernel(EachArgs<scalar_t> a, Params<params, real_of<scalar_t>> p) {
  using real = real_of<scalar_t>;
  constexpr int size = pack_size<scalar_t>;
  real factor = static_cast<real>(F::slope) * (a.grad ? a.scale : real(1));
  if (a.grad && !a.each_grad) factor *= static_cast<real>(load(a.grad));
  for_each_pack<size>(
      a.cut, int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads,
      [&](int64_t i) {
        real x[size], t[size], w[size] = {}, g[size];
        load_wide(a.x + i, x);
        load_wide(a.t + i, t);
        if constexpr (inputs == 3) load_beside(a.w, i, a.period, a.wide_w, w);
        if (a.each_grad) load_wide(a.grad + i, g);
#pragma unroll
        for (int k = 0; k < size; ++k)
          x[k] = value_of<F, inputs>(p, x[k], t[k], w[k], a.to_target) *
                 (a.each_grad ? g[k] * factor : factor);
        store_wide(a.out + i, x);
      },
      [&](int64_t i) {
        const real g = a.each_grad ? static_cast<real>(load(a.grad + i)) * factor : factor;
        const real x = static_cast<real>(load(a.x + i)), t = static_cast<real>(load(a.t + i));
        real w = 0;
        if constexpr (inputs == 3) w = static_cast<real>(load(a.w + i % a.period));
        store(a.out + i, static_cast<scalar_t>(value_of<F, inputs>(p, x, t, w, a.to_target) * g));
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
template <class F, class scalar_t, int inputs, int params>
__global__ void __launch_bounds__(kThreads, kResident)
    chunk_kernel(int64_t n, const scalar_t* x, const scalar_t* t, const scalar_t* w, int64_t period,
                 bool wide, bool wide_w, double* partial, Finish<real_of<scalar_t>> finish,
                 Params<params, real_of<scalar_t>> p) {
  using real = real_of<scalar_t>;
  constexpr int size = pack_size<scalar_t>;
  const int64_t begin = int64_t{blockIdx.x} * kLossChunk;
  const int64_t end = begin + kLossChunk < n ? begin + kLossChunk : n;
  real sum = 0;
  for (int64_t i = begin + threadIdx.x * size; i < end; i += kThreads * size) {
    const int64_t left = end - i;
    real vx[size], vt[size] = {}, vw[size] = {};
    if (wide && left >= size) {
      load_wide(x + i, vx);
      if constexpr (inputs >= 2) load_wide(t + i, vt);
    } else {
      load_narrow(x + i, left, vx);
      if constexpr (inputs >= 2) load_narrow(t + i, left, vt);
    }
    if constexpr (inputs == 3) load_beside(w, i, period, wide_w && left >= size, vw);
    real few = 0;  // one long sum would drift where values are alike
#pragma unroll
    for (int k = 0; k < size; ++k)
      if (k < left) few += value_of<F, inputs>(p, vx[k], vt[k], vw[k]);
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

template <class F, int inputs, int params>
Error each(const LossArgs& a) {
  if (a.n == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    constexpr int size = pack_size<scalar_t>;
    using real = real_of<scalar_t>;
    EachArgs<scalar_t> e;
    e.out = static_cast<scalar_t*>(a.out);
    e.x = static_cast<const scalar_t*>(a.in[0]);
    e.t = static_cast<const scalar_t*>(a.in[1]);
    e.grad = static_cast<const scalar_t*>(a.grad);
    e.scale = static_cast<real>(a.scale);
    e.to_target = a.to_target;
    e.w = inputs == 3 ? static_cast<const scalar_t*>(a.in[2]) : nullptr;
    e.period = a.period;
    e.each_grad = a.grad && !a.grad_is_scalar;
    e.cut = aligned_span(a.n, size, e.out, e.x, e.t, e.each_grad ? e.grad : e.x);
    e.wide_w = inputs == 3 && wide_beside(e.cut, size, e.w, e.period);
    const int64_t items = std::max(e.cut.packs, a.n - e.cut.packs * size);
    return launch(each_kernel<F, scalar_t, inputs, params>, grid_for(items, kThreads), kThreads,
                  a.stream, e, Params<params, real>(a.params));
  });
}

template <class F, int inputs, int params>
Error total(const LossArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using real = real_of<scalar_t>;
    auto* x = static_cast<const scalar_t*>(a.in[0]);
    auto* t = inputs >= 2 ? static_cast<const scalar_t*>(a.in[1]) : x;
    auto* w = inputs == 3 ? static_cast<const scalar_t*>(a.in[2]) : x;
    constexpr int size = pack_size<scalar_t>;
    const bool wide_w = inputs == 3 && aligned(w) && (a.period == a.n || a.period % size == 0);
    auto* partial = static_cast<double*>(a.workspace);
    const Finish<real> finish{static_cast<real*>(a.out), static_cast<const real*>(a.divisor),
                              a.scale};
    const int64_t chunks = (a.n + kLossChunk - 1) / kLossChunk;
    if (chunks > 0) {
      const Error error = launch(chunk_kernel<F, scalar_t, inputs, params>, chunks, kThreads,
                                 a.stream, a.n, x, t, w, a.period, aligned(x, t), wide_w, partial,
                                 finish, Params<params, real>(a.params));
      if (error || chunks == 1) return error;
    }
    return launch(join_kernel<real>, 1, kThreads, a.stream, chunks, partial, finish);
  });
}

template <class Op>
struct Value {
  static constexpr double slope = 1;
  template <class T, class... P>
  static FASTOPS_FN T apply(T x, T t, P... p) {
    return Op::value(x, t, p...);
  }
};
template <class Op>
struct D0 {
  static constexpr double slope = slope_of<Op>();
  template <class T, class... P>
  static FASTOPS_FN T apply(T x, T t, P... p) {
    return Op::d0(x, t, p...);
  }
};
template <class Op>
struct D1 {
  static constexpr double slope = slope_of<Op>();
  template <class T, class... P>
  static FASTOPS_FN T apply(T x, T t, P... p) {
    return Op::d1(x, t, p...);
  }
};
template <class Op>
struct Second {
  static constexpr double slope = slope_of<Op>();
  using of_several = void;
  template <class T, class... P>
  static FASTOPS_FN T apply(int to_target, T x, T t, P... p) {
    return second_derivative<Op>(to_target, x, t, p...);
  }
};
struct Identity {
  template <class T>
  static FASTOPS_FN T apply(T x) {
    return x;
  }
};

// ------------------------------------------------------------------------------------------------
// table

template <class Op>
struct MakeLoss {
  static constexpr int params = count_params(Op::params), inputs = 2 + count_tensors(Op::params);
  static constexpr LossKernel row{Op::name,
                                  Op::params,
                                  &each<Value<Op>, inputs, params>,
                                  &total<Value<Op>, inputs, params>,
                                  &each<D0<Op>, inputs, params>,
                                  &each<D1<Op>, inputs, params>,
                                  &each<Second<Op>, inputs, params>,
                                  domain_of<Op>().low,
                                  domain_of<Op>().high};
};
template <>
struct MakeLoss<Identity> {
  static constexpr LossKernel row{"sum",   "", nullptr, &total<Identity, 1, 0>, nullptr, nullptr,
                                  nullptr, 0,  0};
};

template <class... Ops>
auto with_sum(List<Ops...>) -> List<Ops..., Identity>;
using LossTable = Table<LossKernel, MakeLoss, decltype(with_sum(Losses{}))>;

}  // namespace

extern constinit const KernelTable<LossKernel> loss_kernels{LossTable::rows,
                                                            std::size(LossTable::rows)};

}  // namespace fastops::cuda
