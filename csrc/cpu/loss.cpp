// Elementwise losses and their sums: values, total, first and second derivatives. Sums are taken
// chunk by chunk in an order that n (and the period of what is repeated) alone decides, so that
// they have the same bits for any number of threads.
#include "../kernels/loss.h"
#include "../formulas/losses.h"
#include "parallel.h"
#include "vec_io.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 16384;
constexpr int64_t kBlock = 1024;  // summed in float registers; blocks are joined in double

struct Sum {
  static constexpr const char *name = "sum", *params = "";
  static constexpr int inputs = 1;
  template <class T>
  static FASTOPS_FN T value(T x) {
    return x;
  }
};

// Calls body(i, j, n) for every group of [begin, end): where there is a third input, a row of
// `period` that is repeated, j = i % period.
template <int64_t group, int inputs, bool hot, class Body>
FASTOPS_FN void each_group(int64_t begin, int64_t end, int64_t period, Body body) {
  if constexpr (inputs == 3) {
    for_each_vector_beside<group, hot>(begin, end, period, body);
  } else {
    for_each_vector<group, hot>(begin, end, [&](int64_t i, auto n) { body(i, i, n); });
  }
}

// Looks for inputs that a loss does not take. One that takes all is not looked at.
template <class Op, class L>
struct DomainCheck {
  using V = typename L::V;
  static constexpr Domain domain = domain_of<Op>();
  static constexpr bool bounded = domain.low > -std::numeric_limits<double>::infinity() ||
                                  domain.high < std::numeric_limits<double>::infinity();
  V outside{typename L::real(0)};

  template <class N>
  FASTOPS_FN void look(N n, const V (&x)[L::count]) {
    if constexpr (bounded) {
      const V one(typename L::real(1)), none(typename L::real(0));
      V v[L::count];
      for (int k = 0; k < L::count; ++k) {
        v[k] = select(x[k] <= V(typename L::real(domain.high)), none, one);
        v[k] = select(x[k] >= V(typename L::real(domain.low)), v[k], one);
      }
      if (n < L::size) L::mask_tail(n, 0, v);
      for (int k = 0; k < L::count; ++k) outside = larger(outside, v[k]);
    }
  }
  FASTOPS_FN void tell(bool* result) const {
    if constexpr (bounded)
      if (result && sum_of_lanes(outside) > 0) __atomic_store_n(result, true, __ATOMIC_RELAXED);
  }
};

// sum of f over [begin, end); the third input is a row of `period`, repeated
template <class scalar_t, int inputs, class Check, class F>
FASTOPS_FN double sum_chunk(int64_t begin, int64_t end, const scalar_t* const (&in)[inputs],
                            int64_t period, Check& check, F f) {
  using L = VecIO<scalar_t>;
  using V = typename L::V;
  double sum = 0;
  for (int64_t block = begin; block < end; block += kBlock) {
    V total(typename L::real(0));
    const int64_t behind = block + kBlock < end ? block + kBlock : end;
    for (int64_t from = block; from < behind; from += kFew * L::size) {
      V few(typename L::real(0));
      const int64_t to = from + kFew * L::size < behind ? from + kFew * L::size : behind;
      each_group<L::size, inputs, true>(from, to, period,
                                        [&](int64_t i, [[maybe_unused]] int64_t j, auto n) {
                                          V x[inputs][L::count], v[L::count];
                                          for (int k = 0; k < inputs; ++k)
                                            L::load(in[k] + (k == 2 ? j : i), n, x[k]);
                                          check.look(n, x[0]);
                                          for (int k = 0; k < L::count; ++k) {
                                            if constexpr (inputs == 1) v[k] = f(x[0][k]);
                                            if constexpr (inputs == 2) v[k] = f(x[0][k], x[1][k]);
                                            if constexpr (inputs == 3)
                                              v[k] = f(x[0][k], x[1][k], x[2][k]);
                                          }
                                          if (n < L::size) L::mask_tail(n, 0, v);
                                          for (int k = 0; k < L::count; ++k) few = few + v[k];
                                        });
      total = total + few;
    }
    sum += sum_of_lanes(total);
  }
  return sum;
}

template <class Op, int params, int inputs, class F>
Error total(const LossArgs& a, F f) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using Check = DomainCheck<Op, VecIO<scalar_t>>;
    using real = typename VecIO<scalar_t>::real;
    using V = typename VecIO<scalar_t>::V;
    const Params<params, real> p(a.params);
    const scalar_t* in[inputs];
    for (int k = 0; k < inputs; ++k) in[k] = static_cast<const scalar_t*>(a.in[k]);
    auto* partial = static_cast<double*>(a.workspace);
    const int64_t n = a.n, chunks = (n + kLossChunk - 1) / kLossChunk, period = a.period;
    bool* const outside = a.outside;
    cpu::parallel(chunks, 1, [=](int64_t begin, int64_t end) {
      Check check;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t from = k * kLossChunk, to = from + kLossChunk;
        partial[k] = sum_chunk(from, to < n ? to : n, in, period, check,
                               [&](auto... x) { return with_params<params, V>(f, p.value, x...); });
      }
      check.tell(outside);
    });
    double sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += partial[k];
    sum *= a.scale;
    if (a.divisor) sum /= *static_cast<const real*>(a.divisor);
    *static_cast<real*>(a.out) = static_cast<real>(sum);
    return nullptr;
  });
}

// out[i] = f(x, t, ...) times slope, and times scale * grad[i] where there is a grad
template <class Op, int params, int inputs, bool hot, class F>
Error each(const LossArgs& a, double slope, F f) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = VecIO<scalar_t>;
    using V = typename L::V;
    using real = typename L::real;
    const Params<params, real> p(a.params);
    auto* out = static_cast<scalar_t*>(a.out);
    const scalar_t* in[inputs];
    for (int k = 0; k < inputs; ++k) in[k] = static_cast<const scalar_t*>(a.in[k]);
    const int64_t period = a.period;
    auto* grad = static_cast<const scalar_t*>(a.grad);
    const bool each_grad = grad != nullptr && !a.grad_is_scalar,
               scaled = grad != nullptr || slope != 1;
    const real scale = static_cast<real>(grad ? a.scale * slope : slope);
    const real factor = grad && !each_grad ? L::one(grad) * scale : scale;
    const bool stream =
        (inputs == 2 || period == a.n || period % L::size == 0) && streams<L>(out, a.n, in[0]);
    bool* const outside = a.outside;
    cpu::parallel_vectors<L::size>(a.n, kGrain, [=](int64_t begin, int64_t end) {
      DomainCheck<Op, L> check;
      each_group<L::size, inputs, hot>(begin, end, period, [&](int64_t i, int64_t j, auto n) {
        V x[inputs][L::count], y[L::count], g[L::count];
        for (int k = 0; k < inputs; ++k) L::load(in[k] + (k == 2 ? j : i), n, x[k]);
        check.look(n, x[0]);
        if (each_grad) L::load(grad + i, n, g);
        for (int k = 0; k < L::count; ++k) {
          if constexpr (inputs == 2) y[k] = with_params<params, V>(f, p.value, x[0][k], x[1][k]);
          if constexpr (inputs == 3)
            y[k] = with_params<params, V>(f, p.value, x[0][k], x[1][k], x[2][k]);
          if (scaled) y[k] = y[k] * (each_grad ? g[k] * V(factor) : V(factor));
        }
        L::store(out + i, n, y, stream);
      });
      check.tell(outside);
      if (stream) fence();
    });
    return nullptr;
  });
}

template <class Op>
struct MakeLoss {
  static constexpr int params = count_params(Op::params), inputs = 2 + count_tensors(Op::params);
  static constexpr double slope = slope_of<Op>();

  static Error values(const LossArgs& a) {
    return each<Op, params, inputs, true>(
        a, 1, [](auto x, auto t, auto... p) { return Op::value(x, t, p...); });
  }
  static Error sum(const LossArgs& a) {
    return total<Op, params, inputs>(
        a, [](auto x, auto t, auto... p) { return Op::value(x, t, p...); });
  }
  static Error d0(const LossArgs& a) {
    return each<void, params, inputs, true>(
        a, slope, [](auto x, auto t, auto... p) { return Op::d0(x, t, p...); });
  }
  static Error d1(const LossArgs& a) {
    return each<void, params, inputs, false>(
        a, slope, [](auto x, auto t, auto... p) { return Op::d1(x, t, p...); });
  }
  static Error second(const LossArgs& a) {
    return each<void, params, inputs, false>(a, slope,
                                             [to_target = a.to_target](auto x, auto t, auto... p) {
                                               return second_derivative<Op>(to_target, x, t, p...);
                                             });
  }
  static constexpr LossKernel row{Op::name,
                                  Op::params,
                                  &values,
                                  &sum,
                                  &d0,
                                  &d1,
                                  &second,
                                  domain_of<Op>().low,
                                  domain_of<Op>().high};
};
template <>
struct MakeLoss<Sum> {
  static Error sum(const LossArgs& a) {
    return total<Sum, 0, 1>(a, [](auto x) { return Sum::value(x); });
  }
  static constexpr LossKernel row{Sum::name, Sum::params, nullptr, &sum, nullptr,
                                  nullptr,   nullptr,     0,       0};
};

template <class... Ops>
auto with_sum(List<Ops...>) -> List<Ops..., Sum>;
using LossTable = Table<LossKernel, MakeLoss, decltype(with_sum(Losses{}))>;

}  // namespace

extern constinit const KernelTable<LossKernel> loss_kernels{LossTable::rows,
                                                            std::size(LossTable::rows)};

}  // namespace fastops::CPU_CAPABILITY
