// Elementwise losses and their sums: values, total, first and second derivatives. Sums are taken
// chunk by chunk in an order that n (and the period of what is repeated) alone decides, so that
// they have the same bits for any number of threads.
#include "../kernels/loss.h"
#include "../formulas/losses.h"
#include "elementwise.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 1024;  // summed in float registers; blocks are joined in double

struct Sum {
  static constexpr const char *name = "sum", *params = "";
  static constexpr int inputs = 1;
  template <class T>
  static FASTOPS_FN T value(T x) {
    return x;
  }
};

// Looks for inputs and targets that a loss does not take. One that takes all is not looked at.
template <class Op, class V>
struct DomainCheck {
  static constexpr Domain domain = domain_of<Op>();
  static constexpr bool bounded = domain.low > -std::numeric_limits<double>::infinity() ||
                                  domain.high < std::numeric_limits<double>::infinity();
  static_assert(domain.low <= 0 && domain.high >= 0);  // what is behind the end of a tensor is 0
  V outside[2] = {V(typename V::value_type(0)), V(typename V::value_type(0))};

  // At the k-th operand, of which the first two are the input and the target.
  template <int k>
  FASTOPS_FN void look(const V& x) {
    if constexpr (bounded && k < 2) {
      const V one(typename V::value_type(1)), none(typename V::value_type(0));
      const V low = select(x >= V(typename V::value_type(domain.low)), none, one),
              high = select(x <= V(typename V::value_type(domain.high)), none, one);
      outside[k] = larger(outside[k], larger(low, high));
    }
  }
  FASTOPS_FN void tell(unsigned* result) const {
    if constexpr (bounded)
      for (unsigned k = 0; k < 2; ++k)
        if (result && sum_of_lanes(outside[k]) > 0)
          __atomic_fetch_or(result, 1u << k, __ATOMIC_RELAXED);
  }
};

// The tensors of a call: x, t, and where there is a third a row that is repeated.
template <int inputs>
constexpr unsigned kRepeated = inputs == 3 ? 0b100 : 0;

template <class scalar_t, int inputs>
FASTOPS_FN void take_inputs(const LossArgs& a, Operand<scalar_t>* in) {
  for (int k = 0; k < inputs; ++k) in[k] = {static_cast<const scalar_t*>(a.in[k])};
  if constexpr (inputs == 3) in[2].period = a.period;
}

// Where the slope is written that a formula returns beside its value.
template <class scalar_t>
struct SlopeOutput {
  scalar_t* data;
  bool stream;
};

// The sum of f over [begin, end), or of its first results, of which the second go to `slope`.
template <class Op, class L, class Inputs, class F, class Slope>
FASTOPS_FN double sum_chunk(int64_t begin, int64_t end, const Inputs& inputs,
                            DomainCheck<Op, typename L::V>& check, F f, const Slope& slope) {
  constexpr bool writes = !std::is_same_v<Slope, std::nullptr_t>;
  using V = typename L::V;
  double sum = 0;
  for (int64_t block = begin; block < end; block += kBlock) {
    V total(typename L::real(0));
    const int64_t behind = block + kBlock < end ? block + kBlock : end;
    for (int64_t from = block; from < behind; from += kFew * L::size) {
      V few(typename L::real(0));
      const int64_t to = from + kFew * L::size < behind ? from + kFew * L::size : behind;
      inputs.template for_each_vector<L>(from, to, [&](int64_t i, auto n, auto& x) {
        V v[L::count];
        [[maybe_unused]] V d[L::count];
        for (int k = 0; k < L::count; ++k) {
          check.template look<0>(x[0][k]);
          if constexpr (std::extent_v<std::remove_reference_t<decltype(x)>> > 1)
            check.template look<1>(x[1][k]);
          const auto value = value_of(
              f, x, k,
              std::make_index_sequence<std::extent_v<std::remove_reference_t<decltype(x)>>>{});
          if constexpr (writes) {
            v[k] = value.v[0];
            d[k] = value.v[1];
          } else {
            v[k] = value;
          }
        }
        if constexpr (writes) L::store(slope.data + i, n, d, slope.stream);
        if (n < L::size) L::mask_tail(n, 0, v);
        for (int k = 0; k < L::count; ++k) few = few + v[k];
      });
      total = total + few;
    }
    sum += sum_of_lanes(total);
  }
  return sum;
}

template <class Op, int params, int inputs, bool writes_slope = false, class F>
Error total(const LossArgs& a, F f) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = VecIO<scalar_t>;
    using V = typename L::V;
    using real = typename L::real;
    const Params<params, real> p(a.params);
    Operands<scalar_t, inputs, kRepeated<inputs>> operands;
    take_inputs<scalar_t, inputs>(a, operands.in);
    const auto slope = [&] {
      if constexpr (writes_slope) {
        auto* to = static_cast<scalar_t*>(a.slope);
        return SlopeOutput<scalar_t>{to, streams<L>(to, a.n, operands.in[0].data)};
      } else {
        return nullptr;
      }
    }();
    auto* partial = static_cast<double*>(a.workspace);
    const int64_t n = a.n, chunks = (n + kLossChunk - 1) / kLossChunk;
    unsigned* const outside = a.outside;
    cpu::parallel(chunks, 1, [=](int64_t begin, int64_t end) {
      DomainCheck<Op, V> check;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t from = k * kLossChunk, to = from + kLossChunk;
        partial[k] = sum_chunk<Op, L>(
            from, to < n ? to : n, operands, check,
            [&](auto... x) { return with_params<params, V>(f, p.value, x...); }, slope);
      }
      check.tell(outside);
      if constexpr (writes_slope)
        if (slope.stream) fence();
    });
    double sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += partial[k];
    sum *= a.scale;
    if (a.divisor) sum /= *static_cast<const real*>(a.divisor);
    *static_cast<real*>(a.out) = static_cast<real>(sum);
    return nullptr;
  });
}

// The value, of an input that is looked at.
template <class Op, int params, class L>
struct CheckedValue {
  using V = typename L::V;
  Params<params, typename L::real> p;
  unsigned* outside;
  DomainCheck<Op, V> check;

  template <class... T>
  FASTOPS_FN V operator()(V x, V t, T... others) {
    check.template look<0>(x);
    check.template look<1>(t);
    return with_params<params, V>([](auto x, auto t, auto... p) { return Op::value(x, t, p...); },
                                  p.value, x, t, others...);
  }
  FASTOPS_FN void finish() const { check.tell(outside); }
};

// out[i] = f(x, t, ...) times slope, and times scale and the gradient: a tensor, one number, or 1.
template <int params, int inputs, class F>
Error derivative(const LossArgs& a, double slope, F f) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = VecIO<scalar_t>;
    using V = typename L::V;
    using real = typename L::real;
    const Params<params, real> p(a.params);
    V ones[L::count];
    for (auto& v : ones) v = V(real(1));
    scalar_t one[1];
    L::store(one, 1, ones);
    const Result<scalar_t> out[] = {{static_cast<scalar_t*>(a.out)}};
    Operand<scalar_t> in[1 + inputs];
    take_inputs<scalar_t, inputs>(a, in + 1);
    in[0] = {a.grad ? static_cast<const scalar_t*>(a.grad) : one};
    if (!a.grad || a.grad_is_scalar) in[0].period = 1;
    const V scale(static_cast<real>(a.grad ? a.scale * slope : slope));
    elementwise<1 | kRepeated<inputs> << 1>(a.n, out, in, [=](auto g, auto... x) {
      return with_params<params, V>(f, p.value, x...) * (g * scale);
    });
    return nullptr;
  });
}

template <class Op>
struct MakeLoss {
  static constexpr int params = count_params(Op::params), inputs = 2 + count_tensors(Op::params);
  static constexpr double slope = slope_of<Op>();

  static Error values(const LossArgs& a) {
    return dispatch(a.dtype, [&](auto zero) -> Error {
      using scalar_t = decltype(zero);
      using L = VecIO<scalar_t>;
      const Result<scalar_t> out[] = {{static_cast<scalar_t*>(a.out)}};
      Operand<scalar_t> in[inputs];
      take_inputs<scalar_t, inputs>(a, in);
      const Params<params, typename L::real> p(a.params);
      if constexpr (saves_slope<Op>()) {
        if (a.slope) {
          const Result<scalar_t> both[] = {out[0], {static_cast<scalar_t*>(a.slope)}};
          elementwise(a.n, both, in, [](auto x, auto t) { return value_and_slope<Op>(x, t); });
          return nullptr;
        }
      }
      elementwise<kRepeated<inputs>>(a.n, out, in, CheckedValue<Op, params, L>{p, a.outside, {}});
      return nullptr;
    });
  }
  static Error sum(const LossArgs& a) {
    if constexpr (saves_slope<Op>())
      if (a.slope)
        return total<Op, params, inputs, true>(
            a, [](auto x, auto t) { return value_and_slope<Op>(x, t); });
    return total<Op, params, inputs>(
        a, [](auto x, auto t, auto... p) { return Op::value(x, t, p...); });
  }
  static Error d0(const LossArgs& a) {
    return derivative<params, inputs>(a, slope,
                                      [](auto x, auto t, auto... p) { return Op::d0(x, t, p...); });
  }
  static Error d1(const LossArgs& a) {
    return derivative<params, inputs>(a, slope,
                                      [](auto x, auto t, auto... p) { return Op::d1(x, t, p...); });
  }
  static Error second(const LossArgs& a) {
    return derivative<params, inputs>(a, slope,
                                      [to_target = a.to_target](auto x, auto t, auto... p) {
                                        return second_derivative<Op>(to_target, x, t, p...);
                                      });
  }
  static constexpr LossKernel kernel{Op::name,
                                     Op::params,
                                     &values,
                                     &sum,
                                     &d0,
                                     &d1,
                                     &second,
                                     domain_of<Op>().low,
                                     domain_of<Op>().high,
                                     saves_slope<Op>()};
};
template <>
struct MakeLoss<Sum> {
  static Error sum(const LossArgs& a) {
    return total<Sum, 0, 1>(a, [](auto x) { return Sum::value(x); });
  }
  static constexpr LossKernel kernel{Sum::name, Sum::params, nullptr, &sum, nullptr,
                                     nullptr,   nullptr,     0,       0};
};

template <class... Ops>
auto with_sum(List<Ops...>) -> List<Ops..., Sum>;
using LossTable = Table<LossKernel, MakeLoss, decltype(with_sum(Losses{}))>;

}  // namespace

extern constinit const KernelTable<LossKernel> loss_kernels{LossTable::kernels,
                                                            std::size(LossTable::kernels)};

}  // namespace fastops::CPU_CAPABILITY
