// Elementwise losses as torch sees them: for every kernel `name`, `name_backward` (to input or
// target) and `name_second`, their schemas, checks and derivatives. No formula, no kernel by name.
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "../math.h"
#include "bind.h"
#include "layout.h"
#include "reduction.h"
#include "register.h"

namespace fastops {
namespace {

using at::Tensor;

const KernelTable<LossKernel>& kernels(c10::DeviceType device) { return tables(device).loss; }
const char* name_of(size_t number) { return kernels(c10::DeviceType::CPU).data[number].name; }

// The ops of a kernel. P are its parameters: doubles, or a tensor that broadcasts to the input.
template <class... P>
struct Family {
  const char* name;
  bool saves_slope;
  // (input, target, reduction, float32 result wanted of half inputs, parameters)
  Op<Tensor(const Tensor&, const Tensor&, int64_t, bool, P...)> forward;
  // The same and the slope d0, where that is what backward needs.
  Op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, bool, P...)> with_slope;
  // (grad, input, target, reduction, parameters, 0 for the gradient to the input or 1 to the
  // target)
  Op<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, P..., int64_t)> backward;
  // (input, target, parameters, two of 0 and 1): the second derivative of the values
  Op<Tensor(const Tensor&, const Tensor&, P..., int64_t, int64_t)> second;
};

// ------------------------------------------------------------------------------------------------
// kernels

// Input and target in one dense layout, shape and dtype.
std::pair<Tensor, Tensor> aligned(const char* op, const Tensor& input, const Tensor& target) {
  TORCH_CHECK(input.device() == target.device(), op,
              ": expected input and target on one device, got ", input.device(), " and ",
              target.device());
  TORCH_CHECK(input.sizes() == target.sizes(), op, ": expected input and target of one shape, got ",
              input.sizes(), " and ", target.sizes(), "; torch.broadcast_tensors them first");
  const auto dtype = input.scalar_type() == target.scalar_type() ? input.scalar_type()
                                                                 : at::result_type(input, target);
  const Tensor x = dense(as_dtype(input, dtype));
  check_dtype(op, x);
  return {x, matching(as_dtype(target, dtype), x)};
}

// The parameters of a call on x as its kernels take them.
struct Parameters {
  double scalars[2] = {};
  Repeated operand;

  template <class... P>
  Parameters(const char* op, const Tensor& x, const P&... p) {
    size_t k = 0;
    (add(op, x, k++, p), ...);
  }
  void add(const char*, const Tensor&, size_t k, double p) { scalars[k] = p; }
  void add(const char* op, const Tensor& x, size_t, const Tensor& p) {
    check_like(op, "weight", p, x);
    operand = repeated(p, x);
  }
};

LossArgs arguments(const Tensor& x, const Tensor& t, const Tensor& out, const Parameters& p) {
  LossArgs a{};
  a.dtype = x.scalar_type();
  a.n = x.numel();
  a.out = out.mutable_data_ptr();
  a.in[0] = x.const_data_ptr();
  if (t.defined()) a.in[1] = t.const_data_ptr();
  a.scale = 1;
  a.params = p.scalars;
  if (p.operand.values.defined()) a.in[2] = p.operand.values.const_data_ptr();
  a.period = p.operand.period;
  a.stream = stream_of(x);
  return a;
}

Tensor total(const LossKernel& kernel, const Tensor& x, const Tensor& t, double scale,
             const Tensor& divisor, const Parameters& params, void* slope = nullptr,
             unsigned* outside = nullptr) {
  const Tensor out = output_beside(x, {}, real_of(x.scalar_type()));
  const int64_t bytes = loss_workspace(x.numel());
  constexpr int64_t kStack = 256;
  double stack[kStack];
  const bool fits = x.is_cpu() && bytes <= kStack * 8;
  const Tensor workspace = fits ? Tensor() : at::empty({bytes}, x.options().dtype(at::kByte));
  LossArgs a = arguments(x, t, out, params);
  a.scale = scale;
  if (divisor.defined()) a.divisor = divisor.const_data_ptr();
  a.workspace = fits ? static_cast<void*>(stack) : workspace.mutable_data_ptr();
  a.slope = slope;
  a.outside = outside;
  check(kernel.name, kernel.total(a));
  return out;
}

// On CUDA, where the answer would be a wait for the device, the NaN in the result is left to speak.
void check_domain(const LossKernel& r, unsigned outside) {
  TORCH_CHECK(!outside, r.name, ": all elements of ", outside & 1 ? "input" : "target",
              " should be between ", r.low, " and ", r.high);
}

template <class... P>
struct Forward {
  size_t number;
  explicit Forward(size_t number) : number(number) {}
  Tensor operator()(const Tensor& input, const Tensor& target, int64_t reduction, bool upcast,
                    P... p) {
    return run(input, target, reduction, upcast, p..., nullptr);
  }
  Tensor run(const Tensor& input, const Tensor& target, int64_t reduction, bool upcast, P... p,
             Tensor* slope) {
    check_reduction(name_of(number), reduction);
    auto [x, t] = aligned(name_of(number), input, target);
    if (upcast && reduction == at::Reduction::None) {  // no value is to be rounded to x's dtype
      x = as_dtype(x, real_of(x.scalar_type()));
      t = as_dtype(t, x.scalar_type());
    }
    const c10::DeviceGuard guard(x.device());
    const LossKernel& r = kernels(x.device().type()).data[number];
    const auto beside = [&, &x = x]<class T>(const T& q) {
      if constexpr (std::is_same_v<T, Tensor>) {
        return upcast ? as_dtype(q, x.scalar_type()) : q;
      } else {
        return q;
      }
    };
    const Parameters params(r.name, x, beside(p)...);
    const auto dtype = upcast ? real_of(x.scalar_type()) : x.scalar_type();
    if (slope) *slope = output_like(x);
    void* const to_slope = slope && x.numel() > 0 ? slope->mutable_data_ptr() : nullptr;
    unsigned outside = 0;
    if (reduction == at::Reduction::None) {
      Tensor out = output_like(x);
      if (x.numel() > 0) {
        LossArgs a = arguments(x, t, out, params);
        a.slope = to_slope;
        a.outside = &outside;
        check(r.name, r.values(a));
      }
      check_domain(r, outside);
      return as_dtype(out, dtype);
    }
    // The mean of nothing is nan, as torch has it: 0 / 0.
    const double scale =
        reduction == at::Reduction::Mean ? 1.0 / static_cast<double>(x.numel()) : 1.0;
    const Tensor out = total(r, x, t, scale, Tensor(), params, to_slope, &outside);
    check_domain(r, outside);
    return as_dtype(out, dtype);
  }
};

template <class... P>
struct ForwardWithSlope {
  size_t number;
  explicit ForwardWithSlope(size_t number) : number(number) {}
  std::tuple<Tensor, Tensor> operator()(const Tensor& input, const Tensor& target,
                                        int64_t reduction, bool upcast, P... p) {
    Tensor slope;
    Tensor y = Forward<P...>(number).run(input, target, reduction, upcast, p..., &slope);
    return {y, slope};
  }
};

template <class... P>
struct BackwardOp {
  size_t number;
  explicit BackwardOp(size_t number) : number(number) {}
  Tensor operator()(const Tensor& grad, const Tensor& input, const Tensor& target,
                    int64_t reduction, P... p, int64_t wrt) {
    check_reduction(name_of(number), reduction);
    TORCH_CHECK(wrt == 0 || wrt == 1, name_of(number),
                "_backward: wrt is 0 (input) or 1 (target), got ", wrt);
    const auto [x, t] = aligned(name_of(number), input, target);
    const bool each = reduction == at::Reduction::None;
    TORCH_CHECK(each ? grad.sizes() == x.sizes() : grad.numel() == 1, name_of(number),
                "_backward: grad of shape ", grad.sizes(), " does not fit reduction ", reduction);
    const c10::DeviceGuard guard(x.device());
    const LossKernel& r = kernels(x.device().type()).data[number];
    const Tensor g = as_dtype(grad, x.scalar_type());
    const Tensor dy = each ? matching(g, x) : g;
    Tensor out = output_like(x);
    if (x.numel() > 0) {
      const Parameters params(r.name, x, p...);
      LossArgs a = arguments(x, t, out, params);
      a.grad = dy.const_data_ptr();
      a.grad_is_scalar = !each;
      if (reduction == at::Reduction::Mean) a.scale = 1.0 / static_cast<double>(x.numel());
      check(r.name, (wrt == 0 ? r.d0 : r.d1)(a));
    }
    return as_dtype(out, (wrt == 0 ? input : target).scalar_type());
  }
};

template <class... P>
struct Second {
  size_t number;
  explicit Second(size_t number) : number(number) {}
  Tensor operator()(const Tensor& input, const Tensor& target, P... p, int64_t first,
                    int64_t then) {
    const auto [x, t] = aligned(name_of(number), input, target);
    const c10::DeviceGuard guard(x.device());
    const LossKernel& r = kernels(x.device().type()).data[number];
    Tensor out = output_like(x);
    if (x.numel() == 0) return out;
    const Parameters params(r.name, x, p...);
    LossArgs a = arguments(x, t, out, params);
    a.to_target = static_cast<int>(first + then);
    check(r.name, r.second(a));
    return out;
  }
};

// ------------------------------------------------------------------------------------------------
// derivatives

// A parameter as a derivative is given it, and as the ops take it.
template <class P>
using Given = decltype(call_args::unpacked(std::declval<P>()));
double plain(double p) { return p; }
const Tensor& plain(const DualTensor& p) { return p.value; }

// Raises for a parameter to which a gradient is wanted, as torch has none either: the call is
// torch's to refuse.
void check_constant(const char*, double) {}
void refuse_gradient(const char* op, bool wanted) {
  TORCH_CHECK_NOT_IMPLEMENTED(!wanted, "fastops::", op,
                              ": the gradient to a weight is not implemented; detach it");
}
void check_constant(const char* op, const Tensor& p) { refuse_gradient(op, requires_grad(p)); }
void check_constant(const char* op, const DualTensor& p) { refuse_gradient(op, p.moves()); }

// Values are the reduction, then the parameters that are scalars; one that is a tensor is saved
// last.
void save_parameter(Saved& s, double p) { s.value(p); }
void save_parameter(Saved& s, const Tensor& p) { s.input(p); }
template <class P>
P parameter(const BackwardContext& c, size_t k) {
  if constexpr (std::is_same_v<P, double>) {
    return c.values[k + 1].toDouble();
  } else {
    return c.saved.back();
  }
}
// f(family, reduction, parameters), of what a derivative has saved.
template <class... P, class F>
auto with_parameters(const BackwardContext& c, F f) {
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return f(*static_cast<const Family<P...>*>(c.op), c.values[0].toInt(), parameter<P>(c, I)...);
  }(std::index_sequence_for<P...>{});
}

// values -> the reduction's result, in torch ops
Tensor reduced(const Tensor& values, int64_t reduction) {
  return reduction == at::Reduction::None   ? values
         : reduction == at::Reduction::Mean ? values.mean()
                                            : values.sum();
}

enum { kInput, kTarget };

template <class... P>
struct ForwardDerivative {
  using Family = fastops::Family<P...>;

  static Tensor jvp(const Family& f, const Tensor& y, const DualTensor& x, const DualTensor& t,
                    int64_t reduction, bool, const Given<P>&... p) {
    (check_constant(f.name, p), ...);
    Tensor values;
    if (x.moves())
      values = f.backward.call(x.tangent, x.value, t.value, at::Reduction::None, plain(p)..., 0);
    if (t.moves())
      values = sum_of_defined(values, f.backward.call(t.tangent, x.value, t.value,
                                                      at::Reduction::None, plain(p)..., 1));
    return reduced(values, reduction).to(y.scalar_type());
  }
  static void save(const Family& f, Saved& s, const Tensor&, const Tensor& x, const Tensor& t,
                   int64_t reduction, bool, P... p) {
    (check_constant(f.name, p), ...);
    s.value(reduction);
    s.input(x);
    s.input(t);
    (save_parameter(s, p), ...);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    return with_parameters<P...>(c, [&](const Family& f, int64_t reduction, const auto&... p) {
      variable_list result(2);
      for (int64_t wrt = 0; wrt < 2; ++wrt)
        if (c.wants(wrt))
          result[wrt] =
              f.backward.call(grads[0], c.saved[kInput], c.saved[kTarget], reduction, p..., wrt);
      return result;
    });
  }
};

// Of (values, slope), where slope = d value / dx = -d value / dt is constant in pieces. It is what
// is saved, and has a derivative of 0.
template <class... P>
struct SlopeDerivative {
  using Family = fastops::Family<P...>;
  using Results = std::tuple<Tensor, Tensor>;

  static Results jvp(const Family& f, const Results& y, const DualTensor& x, const DualTensor& t,
                     int64_t reduction, bool upcast, const Given<P>&... p) {
    return {ForwardDerivative<P...>::jvp(f, std::get<0>(y), x, t, reduction, upcast, p...), {}};
  }
  static void save(const Family& f, Saved& s, const Results& y, const Tensor&, const Tensor&,
                   int64_t reduction, bool, P... p) {
    (check_constant(f.name, p), ...);
    s.value(reduction);
    s.output(std::get<1>(y));
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const Tensor& slope = c.saved[0];
    variable_list result(2);
    if (!grads[0].defined()) {
      for (size_t k = 0; k < 2; ++k)
        if (c.wants(k)) result[k] = at::zeros_like(slope);
      return result;
    }
    Tensor g = grads[0];
    if (c.values[0].toInt() == at::Reduction::Mean) {
      const c10::SymFloat n = slope.sym_numel();
      g = at::mul(as_dtype(g, real_of(g.scalar_type())), c10::Scalar(c10::SymFloat(1.0) / n));
    }
    result[kInput] = at::mul(slope, g);
    if (c.wants(kTarget)) result[kTarget] = at::neg(result[kInput]);
    return result;
  }
};
// The forward of such a family: it is recorded together with the slope.
template <class... P>
struct SlopeSavingForward {
  const Family<P...>& f;
  Tensor operator()(c10::DispatchKeySet ks, const Tensor& input, const Tensor& target,
                    int64_t reduction, bool upcast, P... p) const {
    if (call_args::any_requires_grad(input, target))
      return std::get<0>(f.with_slope.call(input, target, reduction, upcast, p...));
    using Signature = Tensor(const Tensor&, const Tensor&, int64_t, bool, P...);
    return AutogradKernel<ForwardDerivative<P...>, Signature>{&f.forward, &f}(
        ks, input, target, reduction, upcast, p...);
  }
};

// Of out = reduced gradient g * d[wrt](x, t) / n: linear in g; to x and t by the second
// derivatives.
template <class... P>
struct BackwardDerivative {
  using Family = fastops::Family<P...>;
  enum { kGrad, kInput, kTarget };

  static Tensor jvp(const Family& f, const Tensor&, const DualTensor& g, const DualTensor& x,
                    const DualTensor& t, int64_t reduction, const Given<P>&... p, int64_t wrt) {
    (check_constant(f.name, p), ...);
    Tensor result;
    if (g.moves())
      result = f.backward.call(g.tangent, x.value, t.value, reduction, plain(p)..., wrt);
    for (int64_t then = 0; then < 2; ++then) {
      const DualTensor& of = then == 0 ? x : t;
      if (!of.moves()) continue;
      const Tensor second = f.second.call(x.value, t.value, plain(p)..., wrt, then);
      Tensor value = at::mul(at::mul(second, of.tangent), g.value);
      if (reduction == at::Reduction::Mean) value = value / x.value.sym_numel();
      result = sum_of_defined(result, value);
    }
    return result;
  }
  static void save(const Family& f, Saved& s, const Tensor&, const Tensor& g, const Tensor& x,
                   const Tensor& t, int64_t reduction, P... p, int64_t wrt) {
    (check_constant(f.name, p), ...);
    for (const Tensor* saved : {&g, &x, &t}) s.input(*saved);
    s.value(reduction);
    (save_parameter(s, p), ...);
    s.value(wrt);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const int64_t wrt = c.values.back().toInt();
    return with_parameters<P...>(c, [&](const Family& f, int64_t reduction, const auto&... p) {
      const Tensor &g = c.saved[kGrad], &x = c.saved[kInput], &t = c.saved[kTarget], &v = grads[0];
      variable_list result(3);
      if (c.wants(kGrad))
        result[kGrad] =
            reduced(f.backward.call(v, x, t, at::Reduction::None, p..., wrt), reduction);
      for (int64_t then = 0; then < 2; ++then) {
        if (!c.wants(kInput + then)) continue;
        Tensor value = at::mul(at::mul(f.second.call(x, t, p..., wrt, then), v), g);
        if (reduction == at::Reduction::Mean) value = value / x.sym_numel();
        result[kInput + then] = value;
      }
      return result;
    });
  }
};

// ------------------------------------------------------------------------------------------------
// registration

// Calls f.operator()<parameters>(number, kernel) for the losses of the table.
template <class F>
void each_kernel(F f) {
  size_t i = 0;
  for (const LossKernel& k : kernels(c10::DeviceType::CPU)) {
    if (k.values == nullptr) continue;  // "sum", which is no loss
    const int scalars = count_params(k.params), tensors = count_tensors(k.params);
    TORCH_INTERNAL_ASSERT(scalars + tensors <= 1, "a loss with more than one parameter: ", k.name);
    if (tensors) {
      f.template operator()<const Tensor&>(i, k);
    } else if (scalars) {
      f.template operator()<double>(i, k);
    } else {
      f.template operator()<>(i, k);
    }
    ++i;
  }
}

// By number; they live as long as the process.
constinit std::vector<const void*> families;

// "float beta=1.0" -> "float beta": what has a default cannot stand before what has none.
std::string without_defaults(const std::string& params) {
  std::string given;
  for (size_t at = 0, end; at < params.size();
       at = std::min(params.find(',', end), params.size())) {
    end = params.find('=', at);
    given += params.substr(at, end - at);
  }
  return given;
}

template <class... P>
void define(torch::Library& m, size_t number, const LossKernel& k) {
  auto& f = *new Family<P...>{k.name, k.saves_slope, {}, {}, {}, {}};
  families.push_back(&f);
  const std::string n = k.name, params = *k.params ? std::string(", ") + k.params : "",
                    given = without_defaults(params),
                    first = count_tensors(k.params) ? ", int reduction, bool upcast"
                                                    : ", int reduction=1, bool upcast=False";
  const std::string signature = "(Tensor input, Tensor target" + first + params + ") -> ";
  Registration forward(m, f.forward, n, signature + "Tensor");
  forward.kernel(Forward<P...>(number)).template autocast_upcasts<3>();
  if (k.saves_slope) {
    forward.on(c10::DispatchKey::Autograd, SlopeSavingForward<P...>{f});
    Registration(m, f.with_slope, n + "_with_slope", signature + "(Tensor, Tensor slope)")
        .kernel(ForwardWithSlope<P...>(number))
        .template derivative<SlopeDerivative<P...>>(f);
  } else {
    forward.template derivative<ForwardDerivative<P...>>(f);
  }
  Registration(
      m, f.backward, n + "_backward",
      "(Tensor grad, Tensor input, Tensor target, int reduction" + given + ", int wrt) -> Tensor")
      .kernel(BackwardOp<P...>(number))
      .template derivative<BackwardDerivative<P...>>(f);
  Registration(m, f.second, n + "_second",
               "(Tensor input, Tensor target" + given + ", int first, int then) -> Tensor")
      .kernel(Second<P...>(number))
      .not_differentiable();
}

template <class... P>
void bind(pybind11::module_& m, const Family<P...>& f) {
  def(m, f.name, [&f](const Tensor& input, const Tensor& target, int64_t reduction, P... p) {
    return f.forward.call(input, target, reduction, false, p...);
  });
}

}  // namespace

Tensor sum_of(const Tensor& values, double scale, const Tensor& divisor) {
  const c10::DeviceGuard guard(values.device());
  const auto& all = kernels(values.device().type());
  return total(all.data[all.size - 1], values, Tensor(), scale, divisor, Parameters("sum", values));
}

void register_losses(torch::Library& m) {
  each_kernel([&]<class... P>(size_t i, const LossKernel& k) { define<P...>(m, i, k); });
}

void bind_losses(pybind11::module_& m) {
  each_kernel([&]<class... P>(size_t i, const LossKernel&) {
    bind(m, *static_cast<const Family<P...>*>(families[i]));
  });
}

}  // namespace fastops
