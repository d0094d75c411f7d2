// Elementwise losses as torch sees them: for every row `name`, `name_backward` (to input or target)
// and `name_second`, their schemas, checks and derivatives. No formula, no row by name.
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>

#include "../math.h"
#include "autograd.h"
#include "backend.h"
#include "bind.h"
#include "layout.h"
#include "reduction.h"

namespace fastops {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;

// P are a row's parameters: doubles, or a tensor that broadcasts to the input.
template <class... P>
struct Ops {
  // (input, target, reduction, float32 result wanted of half inputs, parameters)
  c10::TypedOperatorHandle<Tensor(const Tensor&, const Tensor&, int64_t, bool, P...)> forward;
  // (grad, input, target, reduction, parameters, 0 for the gradient to the input or 1 to the
  // target)
  c10::TypedOperatorHandle<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, P...,
                                  int64_t)>
      backward;
  // (input, target, parameters, two of 0 and 1): the second derivative of the values
  c10::TypedOperatorHandle<Tensor(const Tensor&, const Tensor&, P..., int64_t, int64_t)> second;
};
constexpr size_t kMaxRows = 32;

const KernelTable<LossKernel>& rows(c10::DeviceType device) { return tables(device).loss; }
const char* name_of(size_t row) { return rows(c10::DeviceType::CPU).data[row].name; }

template <class... P>
const Ops<P...>& ops(size_t row) {
  static std::array<std::unique_ptr<const Ops<P...>>, kMaxRows> cache;
  static std::array<std::once_flag, kMaxRows> once;
  std::call_once(once[row], [row] {
    const std::string n = name_of(row);
    cache[row] = std::make_unique<const Ops<P...>>(Ops<P...>{
        find_op<Tensor(const Tensor&, const Tensor&, int64_t, bool, P...)>(n),
        find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, P..., int64_t)>(
            n + "_backward"),
        find_op<Tensor(const Tensor&, const Tensor&, P..., int64_t, int64_t)>(n + "_second")});
  });
  return *cache[row];
}

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

Tensor total(const LossKernel& row, const Tensor& x, const Tensor& t, double scale,
             const Tensor& divisor, const Parameters& params, bool* outside = nullptr) {
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
  a.outside = outside;
  check(row.name, row.total(a));
  return out;
}

// On CUDA, where the answer would be a wait for the device, the NaN in the result is left to speak.
void check_domain(const LossKernel& r, bool outside) {
  TORCH_CHECK(!outside, r.name, ": all elements of input should be between ", r.low, " and ",
              r.high);
}

template <class... P>
struct Forward {
  size_t row;
  explicit Forward(size_t row) : row(row) {}
  Tensor operator()(const Tensor& input, const Tensor& target, int64_t reduction, bool upcast,
                    P... p) {
    check_reduction(name_of(row), reduction);
    const auto [x, t] = aligned(name_of(row), input, target);
    const c10::DeviceGuard guard(x.device());
    const LossKernel& r = rows(x.device().type()).data[row];
    const Parameters params(r.name, x, p...);
    const auto dtype = upcast ? real_of(x.scalar_type()) : x.scalar_type();
    bool outside = false;
    if (reduction == at::Reduction::None) {
      Tensor out = output_like(x);
      if (x.numel() > 0) {
        LossArgs a = arguments(x, t, out, params);
        a.outside = &outside;
        check(r.name, r.values(a));
      }
      check_domain(r, outside);
      return as_dtype(out, dtype);
    }
    // The mean of nothing is nan, as torch has it: 0 / 0.
    const double scale =
        reduction == at::Reduction::Mean ? 1.0 / static_cast<double>(x.numel()) : 1.0;
    const Tensor out = total(r, x, t, scale, Tensor(), params, &outside);
    check_domain(r, outside);
    return as_dtype(out, dtype);
  }
};

template <class... P>
struct BackwardOp {
  size_t row;
  explicit BackwardOp(size_t row) : row(row) {}
  Tensor operator()(const Tensor& grad, const Tensor& input, const Tensor& target,
                    int64_t reduction, P... p, int64_t wrt) {
    check_reduction(name_of(row), reduction);
    TORCH_CHECK(wrt == 0 || wrt == 1, name_of(row),
                "_backward: wrt is 0 (input) or 1 (target), got ", wrt);
    const auto [x, t] = aligned(name_of(row), input, target);
    const bool each = reduction == at::Reduction::None;
    TORCH_CHECK(each ? grad.sizes() == x.sizes() : grad.numel() == 1, name_of(row),
                "_backward: grad of shape ", grad.sizes(), " does not fit reduction ", reduction);
    const c10::DeviceGuard guard(x.device());
    const LossKernel& r = rows(x.device().type()).data[row];
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
  size_t row;
  explicit Second(size_t row) : row(row) {}
  Tensor operator()(const Tensor& input, const Tensor& target, P... p, int64_t first,
                    int64_t then) {
    const auto [x, t] = aligned(name_of(row), input, target);
    const c10::DeviceGuard guard(x.device());
    const LossKernel& r = rows(x.device().type()).data[row];
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

// Attributes are the row, the reduction and the parameters that are scalars; one that is a tensor
// is saved last.
template <class P>
P parameter(const BackwardContext& c, size_t k) {
  if constexpr (std::is_same_v<P, double>) {
    return c.attributes[k + 2].toDouble();
  } else {
    return c.saved.back();
  }
}
void add(double p, std::vector<Save>&, std::vector<c10::IValue>& attributes) {
  attributes.emplace_back(p);
}
void add(const Tensor& p, std::vector<Save>& saves, std::vector<c10::IValue>&) {
  saves.push_back({p});
}

// Raises for a parameter to which a gradient is wanted, as torch has none either: the call is
// torch's to refuse.
void check_constant(const std::string&, double) {}
void check_constant(const std::string& op, const Tensor& p) {
  TORCH_CHECK_NOT_IMPLEMENTED(!requires_grad(p) && !is_dual(p), op,
                              ": the gradient to a weight is not implemented; detach it");
}

template <class... P, class F>
auto with_parameters(const BackwardContext& c, F f) {
  const auto& op = ops<P...>(static_cast<size_t>(c.attributes[0].toInt()));
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return f(op, c.attributes[1].toInt(), parameter<P>(c, I)...);
  }(std::index_sequence_for<P...>{});
}

Tensor plus(const Tensor& a, const Tensor& b) {
  return !a.defined() ? b : !b.defined() ? a : at::add(a, b);
}

template <class... P>
variable_list forward_vjp(const variable_list& grads, const BackwardContext& c) {
  return with_parameters<P...>(c, [&](const auto& op, int64_t reduction, const auto&... p) {
    variable_list result(2);
    for (int64_t wrt = 0; wrt < 2; ++wrt)
      if (c.needed[wrt])
        result[wrt] = op.backward.call(grads[0], c.saved[0], c.saved[1], reduction, p..., wrt);
    return result;
  });
}

// values -> the reduction's result, in torch ops
Tensor reduced(const Tensor& values, int64_t reduction) {
  return reduction == at::Reduction::None   ? values
         : reduction == at::Reduction::Mean ? values.mean()
                                            : values.sum();
}

// Of out = reduced gradient g * d[wrt](x, t) / n: linear in g; to x and t by the second
// derivatives.
template <class... P>
variable_list backward_vjp(const variable_list& grads, const BackwardContext& c) {
  const int64_t wrt = c.attributes.back().toInt();
  return with_parameters<P...>(c, [&](const auto& op, int64_t reduction, const auto&... p) {
    const Tensor &g = c.saved[0], &x = c.saved[1], &t = c.saved[2], &v = grads[0];
    variable_list result(3);
    if (c.needed[0]) {
      const Tensor values = op.backward.call(v, x, t, at::Reduction::None, p..., wrt);
      result[0] = reduced(values, reduction);
    }
    for (int64_t then = 0; then < 2; ++then) {
      if (!c.needed[1 + then]) continue;
      Tensor value = at::mul(at::mul(op.second.call(x, t, p..., wrt, then), v), g);
      if (reduction == at::Reduction::Mean) value = value / x.sym_numel();
      result[1 + then] = value;
    }
    return result;
  });
}

// -- of a loss that saves its slope S = d value / dx = -d value / dt

variable_list slope_vjp(const variable_list& grads, const BackwardContext& c) {
  const Tensor& slope = c.saved[0];
  Tensor g = grads[0];
  if (c.attributes[0].toInt() == at::Reduction::Mean) {
    const c10::SymFloat n = slope.sym_numel();
    g = at::mul(as_dtype(g, real_of(g.scalar_type())), c10::Scalar(c10::SymFloat(1.0) / n));
  }
  variable_list result(2);
  result[0] = at::mul(slope, g);
  if (c.needed[1]) result[1] = at::neg(result[0]);
  return result;
}

// Of S itself, which is constant in pieces.
variable_list zero_vjp(const variable_list& grads, const BackwardContext& c) {
  variable_list result(2);
  for (size_t k = 0; k < 2; ++k)
    if (c.needed[k]) result[k] = at::zeros_like(grads[0]);
  return result;
}

template <class... P>
struct ForwardAutograd {
  size_t row;
  std::string label;
  bool saves_slope;
  explicit ForwardAutograd(size_t row)
      : row(row),
        label("fastops::" + std::string(name_of(row))),
        saves_slope(rows(c10::DeviceType::CPU).data[row].saves_slope) {}
  Tensor operator()(DispatchKeySet ks, const Tensor& input, const Tensor& target, int64_t reduction,
                    bool upcast, P... p) {
    (check_constant(label, p), ...);
    const auto& op = ops<P...>(row);
    Tensor y;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      y = op.forward.redispatch(ks & c10::after_autograd_keyset, input, target, reduction, upcast,
                                p...);
    }
    Tensor dy;
    if (is_dual(input) || is_dual(target)) {
      const Tensor x = primal(input), t = primal(target);
      Tensor values;
      if (is_dual(input))
        values = op.backward.call(tangent(input), x, t, at::Reduction::None, p..., 0);
      if (is_dual(target))
        values =
            plus(values, op.backward.call(tangent(target), x, t, at::Reduction::None, p..., 1));
      dy = reduced(values, reduction).to(y.scalar_type());
    }
    set_tangent(y, dy);
    if (requires_grad(input, target) && saves_slope) {
      Tensor slope;
      {
        at::AutoDispatchBelowADInplaceOrView guard;
        const Tensor one = at::ones({}, input.options());
        slope = op.backward.redispatch(ks & c10::after_autograd_keyset, one, input, target,
                                       at::Reduction::Sum, p..., 0);
      }
      record(label.c_str(), &zero_vjp, {slope}, {input, target}, {}, {});
      record(label.c_str(), &slope_vjp, {y}, {input, target}, {{slope}}, {reduction});
    } else if (requires_grad(input, target)) {
      std::vector<Save> saves{{input}, {target}};
      std::vector<c10::IValue> attributes{static_cast<int64_t>(row), reduction};
      (add(p, saves, attributes), ...);
      record(label.c_str(), &forward_vjp<P...>, {y}, {input, target}, std::move(saves),
             std::move(attributes));
    }
    return y;
  }
};

template <class... P>
struct BackwardAutograd {
  size_t row;
  std::string label;
  explicit BackwardAutograd(size_t row)
      : row(row), label("fastops::" + std::string(name_of(row)) + "_backward") {}
  Tensor operator()(DispatchKeySet ks, const Tensor& grad, const Tensor& input,
                    const Tensor& target, int64_t reduction, P... p, int64_t wrt) {
    (check_constant(label, p), ...);
    const auto& op = ops<P...>(row);
    Tensor dx;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      dx = op.backward.redispatch(ks & c10::after_autograd_keyset, grad, input, target, reduction,
                                  p..., wrt);
    }
    Tensor dual;
    const Tensor g = primal(grad), x = primal(input), t = primal(target);
    if (is_dual(grad)) dual = op.backward.call(tangent(grad), x, t, reduction, p..., wrt);
    for (int64_t then = 0; then < 2; ++then) {
      const Tensor& of = then == 0 ? input : target;
      if (!is_dual(of)) continue;
      Tensor value = at::mul(at::mul(op.second.call(x, t, p..., wrt, then), tangent(of)), g);
      if (reduction == at::Reduction::Mean) value = value / x.sym_numel();
      dual = plus(dual, value);
    }
    set_tangent(dx, dual);
    if (requires_grad(grad, input, target)) {
      std::vector<Save> saves{{grad}, {input}, {target}};
      std::vector<c10::IValue> attributes{static_cast<int64_t>(row), reduction};
      (add(p, saves, attributes), ...);
      attributes.emplace_back(wrt);
      record(label.c_str(), &backward_vjp<P...>, {dx}, {grad, input, target}, std::move(saves),
             std::move(attributes));
    }
    return dx;
  }
};

template <class... P>
struct SecondAutograd {
  size_t row;
  std::string label;
  explicit SecondAutograd(size_t row)
      : row(row), label("fastops::" + std::string(name_of(row)) + "_second") {}
  Tensor operator()(DispatchKeySet ks, const Tensor& input, const Tensor& target, P... p,
                    int64_t first, int64_t then) {
    (check_constant(label, p), ...);
    TORCH_CHECK_NOT_IMPLEMENTED(!is_dual(input) && !is_dual(target), "forward-mode derivative of ",
                                label, " is not implemented");
    Tensor out;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      out = ops<P...>(row).second.redispatch(ks & c10::after_autograd_keyset, input, target, p...,
                                             first, then);
    }
    if (requires_grad(input, target)) record_not_implemented(label.c_str(), out, {input, target});
    return out;
  }
};

// Under autocast the loss is float32, though input and target are read as they are.
template <class... P, DispatchKey key>
Tensor autocast(const Ops<P...>& op, std::integral_constant<DispatchKey, key>, const Tensor& input,
                const Tensor& target, int64_t reduction, P... p) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  return op.forward.call(input, target, reduction, /*upcast=*/true, p...);
}
template <DispatchKey key, class... P>
struct Autocast {
  size_t row;
  explicit Autocast(size_t row) : row(row) {}
  Tensor operator()(const Tensor& input, const Tensor& target, int64_t reduction, bool, P... p) {
    return autocast<P...>(ops<P...>(row), std::integral_constant<DispatchKey, key>{}, input, target,
                          reduction, p...);
  }
};

// ------------------------------------------------------------------------------------------------
// registration

template <class... P>
void define(torch::Library& m, size_t row, const LossKernel& r) {
  const std::string n = r.name, params = *r.params ? std::string(", ") + r.params : "";
  std::string
      given;  // the parameters without defaults, which cannot stand before arguments that have none
  for (size_t at = 0, end; at < params.size();
       at = std::min(params.find(',', end), params.size())) {
    end = params.find('=', at);
    given += params.substr(at, end - at);
  }
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const std::string first = count_tensors(r.params) ? ", int reduction, bool upcast"
                                                    : ", int reduction=1, bool upcast=False";
  m.def((n + "(Tensor input, Tensor target" + first + params + ") -> Tensor").c_str(), tags);
  m.def((n + "_backward(Tensor grad, Tensor input, Tensor target, int reduction" + given +
         ", int wrt) -> Tensor")
            .c_str(),
        tags);
  m.def((n + "_second(Tensor input, Tensor target" + given + ", int first, int then) -> Tensor")
            .c_str(),
        tags);
  const auto impl = [&](const std::string& name, DispatchKey key, torch::CppFunction f) {
    m.impl(name.c_str(), torch::dispatch(key, std::move(f)));
  };
  for (const auto key : {DispatchKey::CPU, DispatchKey::CUDA}) {
    if (key == DispatchKey::CUDA && !cuda_built()) continue;
    impl(n, key, torch::CppFunction(Forward<P...>(row)));
    impl(n + "_backward", key, torch::CppFunction(BackwardOp<P...>(row)));
    impl(n + "_second", key, torch::CppFunction(Second<P...>(row)));
  }
  impl(n, DispatchKey::Autograd, torch::CppFunction(ForwardAutograd<P...>(row)));
  impl(n + "_backward", DispatchKey::Autograd, torch::CppFunction(BackwardAutograd<P...>(row)));
  impl(n + "_second", DispatchKey::Autograd, torch::CppFunction(SecondAutograd<P...>(row)));
  impl(n, DispatchKey::AutocastCPU,
       torch::CppFunction(Autocast<DispatchKey::AutocastCPU, P...>(row)));
  impl(n, DispatchKey::AutocastCUDA,
       torch::CppFunction(Autocast<DispatchKey::AutocastCUDA, P...>(row)));
}

template <class... P>
void bind(pybind11::module_& m, size_t row, const LossKernel& r) {
  def(m, r.name, [row](const Tensor& input, const Tensor& target, int64_t reduction, P... p) {
    return ops<P...>(row).forward.call(input, target, reduction, false, p...);
  });
}

template <class F>
void each_row(F f) {
  size_t i = 0;
  for (const LossKernel& r : rows(c10::DeviceType::CPU)) {
    if (r.values == nullptr) continue;  // "sum", which is no loss
    const int scalars = count_params(r.params), tensors = count_tensors(r.params);
    TORCH_INTERNAL_ASSERT(scalars + tensors <= 1, "a loss with more than one parameter: ", r.name);
    if (tensors) {
      f.template operator()<const Tensor&>(i, r);
    } else if (scalars) {
      f.template operator()<double>(i, r);
    } else {
      f.template operator()<>(i, r);
    }
    ++i;
  }
  TORCH_INTERNAL_ASSERT(i <= kMaxRows);
}

TORCH_LIBRARY_FRAGMENT(fastops, m) {
  each_row([&]<class... P>(size_t i, const LossKernel& r) { define<P...>(m, i, r); });
}

}  // namespace

Tensor sum_of(const Tensor& values, double scale, const Tensor& divisor) {
  const c10::DeviceGuard guard(values.device());
  const auto& all = rows(values.device().type());
  return total(all.data[all.size - 1], values, Tensor(), scale, divisor, Parameters("sum", values));
}

void bind_losses(pybind11::module_& m) {
  each_row([&]<class... P>(size_t i, const LossKernel& r) { bind<P...>(m, i, r); });
}

}  // namespace fastops
