// Batch norm with the addition and the activation after it, as torch sees it: schemas, checks,
// layouts and derivatives. Gradients of gradients and forward-mode derivatives are made of torch's
// own ops.
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/mish_backward.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/sub.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "../kernels/batch_norm.h"
#include "autograd.h"
#include "backend.h"
#include "bind.h"
#include "layout.h"
#include "register.h"

namespace fastops {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using MaybeTensor = std::optional<Tensor>;

constexpr const char* kName = "batch_norm_act";
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor or_undefined(const MaybeTensor& t) { return t.value_or(Tensor()); }
MaybeTensor or_none(const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

// How x lies in memory.
struct Layout {
  bool channels_last;
  at::MemoryFormat format;
};
Layout layout_of(const Tensor& x) {
  if (x.dim() == 4 && !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast))
    return {true, at::MemoryFormat::ChannelsLast};
  if (x.dim() == 5 && !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast3d))
    return {true, at::MemoryFormat::ChannelsLast3d};
  return {x.dim() == 2, at::MemoryFormat::Contiguous};
}

BatchNormArgs arguments(const Tensor& x, bool channels_last, const MaybeTensor& weight,
                        const MaybeTensor& bias, const Tensor& mean, const Tensor& inverse,
                        int64_t activation, double slope) {
  BatchNormArgs a{};
  a.dtype = x.scalar_type();
  a.images = x.size(0);
  a.channels = x.size(1);
  a.positions = x.numel() / (a.images * a.channels);
  a.channels_last = channels_last;
  a.x = x.const_data_ptr();
  a.mean = mean.defined() ? mean.const_data_ptr() : nullptr;
  a.inverse = inverse.defined() ? inverse.const_data_ptr() : nullptr;
  a.weight = weight && weight->defined() ? weight->const_data_ptr() : nullptr;
  a.bias = bias && bias->defined() ? bias->const_data_ptr() : nullptr;
  a.activation = static_cast<NormActivation>(activation);
  a.slope = slope;
  a.stream = stream_of(x);
  return a;
}

// A vector over the channels in what x is computed in, contiguous.
MaybeTensor per_channel(const char* what, const MaybeTensor& t, const Tensor& x) {
  if (!t || !t->defined()) return std::nullopt;
  TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(1), kName, ": expected ", what, " to be ",
              x.size(1), " values, one a channel, got shape ", t->sizes());
  TORCH_CHECK(t->device() == x.device(), kName, ": ", what, " is on ", t->device(),
              " and the input on ", x.device());
  return as_dtype(*t, real_of(x.scalar_type())).contiguous();
}

const BatchNormKernel& kernel(const Tensor& x) {
  const BatchNormKernel& k = tables(x.device().type()).batch_norm;
  TORCH_CHECK_NOT_IMPLEMENTED(k.forward, kName, ": no kernels for ", x.device().type());
  return k;
}

Results forward(const Tensor& input, const MaybeTensor& residual, const MaybeTensor& weight,
                const MaybeTensor& bias, const MaybeTensor& running_mean,
                const MaybeTensor& running_var, bool training, double eps, int64_t activation,
                double slope) {
  check_dtype(kName, input);
  TORCH_CHECK(input.dim() >= 2, kName, ": expected an input of 2 dimensions or more, got ",
              input.sizes());
  TORCH_CHECK_NOT_IMPLEMENTED(input.numel() > 0, kName, ": an empty input is left to torch");
  const BatchNormKernel& k = kernel(input);
  const c10::DeviceGuard guard(input.device());
  const Layout layout = layout_of(input);
  const Tensor x = input.contiguous(layout.format);
  Tensor r;
  if (residual && residual->defined()) {
    check_like(kName, "residual", *residual, input);
    TORCH_CHECK(residual->sizes() == input.sizes(), kName, ": expected a residual of shape ",
                input.sizes(), ", got ", residual->sizes());
    r = matching(*residual, x);
  }
  const MaybeTensor w = per_channel("weight", weight, x), b = per_channel("bias", bias, x);
  const auto real = real_of(x.scalar_type());
  const auto options = x.options().dtype(real).memory_format(std::nullopt);
  Tensor mean, variance, inverse = at::empty({x.size(1)}, options);
  if (training) {
    mean = at::empty({x.size(1)}, options);
    variance = at::empty({x.size(1)}, options);
    BatchNormArgs a = arguments(x, layout.channels_last, {}, {}, {}, {}, 0, 0);
    a.totals[0] = mean.mutable_data_ptr();
    a.totals[1] = variance.mutable_data_ptr();
    const Tensor workspace = at::empty({batch_norm_workspace(a.images, a.channels, a.positions)},
                                       x.options().dtype(at::kByte).memory_format(std::nullopt));
    a.workspace = workspace.mutable_data_ptr();
    check(kName, k.statistics(a));
  } else {
    TORCH_CHECK(running_mean && running_var, kName,
                ": running statistics are needed outside of training");
    // Copies: the running ones may change before the backward pass.
    mean = at::empty({x.size(1)}, options).copy_(*per_channel("running_mean", running_mean, x));
    variance = at::empty({x.size(1)}, options).copy_(*per_channel("running_var", running_var, x));
  }
  const auto invert = [&](auto zero) {
    using T = decltype(zero);
    const auto* v = variance.const_data_ptr<T>();
    auto* to = inverse.mutable_data_ptr<T>();
    for (int64_t c = 0; c < x.size(1); ++c)
      to[c] = static_cast<T>(1 / std::sqrt(static_cast<double>(v[c]) + eps));
  };
  if (real == at::kDouble) {
    invert(double{});
  } else {
    invert(float{});
  }
  Tensor y = output_like(x);
  BatchNormArgs a = arguments(x, layout.channels_last, w, b, mean, inverse, activation, slope);
  a.residual = r.defined() ? r.const_data_ptr() : nullptr;
  a.y = y.mutable_data_ptr();
  check(kName, k.forward(a));
  return {y, mean, inverse, variance};
}

// `residual` is the output where `residual_is_output`.
Results backward(const Tensor& grad, const Tensor& input, const MaybeTensor& residual,
                 bool residual_is_output, const MaybeTensor& weight, const MaybeTensor& bias,
                 const Tensor& mean, const Tensor& inverse, bool training, double /*eps*/,
                 int64_t activation, double slope, bool to_residual) {
  const BatchNormKernel& k = kernel(input);
  const c10::DeviceGuard guard(input.device());
  const Layout layout = layout_of(input);
  const Tensor x = input.contiguous(layout.format), dy = matching(resolved(grad), x);
  const Tensor r = residual && residual->defined() ? matching(*residual, x) : Tensor();
  const MaybeTensor w = per_channel("weight", weight, x), b = per_channel("bias", bias, x);
  BatchNormArgs a = arguments(x, layout.channels_last, w, b, mean, inverse, activation, slope);
  a.dy = dy.const_data_ptr();
  a.residual = r.defined() ? r.const_data_ptr() : nullptr;
  a.residual_is_output = residual_is_output;
  const auto options = mean.options();
  Tensor dbias = at::empty({x.size(1)}, options), dweight = at::empty({x.size(1)}, options);
  a.totals[0] = dbias.mutable_data_ptr();
  a.totals[1] = dweight.mutable_data_ptr();
  const Tensor workspace = at::empty({batch_norm_workspace(a.images, a.channels, a.positions)},
                                     x.options().dtype(at::kByte).memory_format(std::nullopt));
  a.workspace = workspace.mutable_data_ptr();
  check(kName, k.sums(a));
  Tensor dx = output_like(x), dresidual = to_residual ? output_like(x) : Tensor();
  a.dx = dx.mutable_data_ptr();
  if (to_residual) a.dresidual = dresidual.mutable_data_ptr();
  if (!training) a.totals[0] = a.totals[1] = nullptr;
  check(kName, k.backward(a));
  dweight.mul_(inverse);
  if (weight && weight->defined()) dweight = as_dtype(dweight, weight->scalar_type());
  if (bias && bias->defined()) dbias = as_dtype(dbias, bias->scalar_type());
  if (!dresidual.defined()) dresidual = at::empty({0}, x.options().memory_format(std::nullopt));
  return {dx, dresidual, dweight, dbias};
}

// ------------------------------------------------------------------------------------------------
// in torch's own ops

Tensor activate(const Tensor& z, int64_t activation, double slope) {
  switch (static_cast<NormActivation>(activation)) {
    case NormActivation::kNone:
      return z;
    case NormActivation::kReLU:
      return at::relu(z);
    case NormActivation::kReLU6:
      return at::hardtanh(z, 0, 6);
    case NormActivation::kLeakyReLU:
      return at::leaky_relu(z, slope);
    case NormActivation::kSiLU:
      return at::silu(z);
    case NormActivation::kGELU:
      return at::gelu(z);
    case NormActivation::kHardswish:
      return at::hardswish(z);
    case NormActivation::kMish:
      return at::mish(z);
  }
  return z;
}

Tensor activate_backward(const Tensor& dy, const Tensor& z, int64_t activation, double slope) {
  switch (static_cast<NormActivation>(activation)) {
    case NormActivation::kNone:
      return dy;
    case NormActivation::kReLU:
      return at::mul(dy, at::gt(z, 0));
    case NormActivation::kReLU6:
      return at::mul(dy, at::gt(z, 0).logical_and_(at::lt(z, 6)));
    case NormActivation::kLeakyReLU:
      return at::leaky_relu_backward(dy, z, slope, false);
    case NormActivation::kSiLU:
      return at::silu_backward(dy, z);
    case NormActivation::kGELU:
      return at::gelu_backward(dy, z);
    case NormActivation::kHardswish:
      return at::hardswish_backward(dy, z);
    case NormActivation::kMish:
      return at::mish_backward(dy, z);
  }
  return dy;
}

// Of all that the gradient is computed from; differentiable.
variable_list composed_backward(const Tensor& dy, const Tensor& x, const Tensor& residual,
                                bool residual_is_output, const Tensor& weight, const Tensor& bias,
                                const Tensor& mean, const Tensor& inverse, bool training,
                                double eps, int64_t activation, double slope,
                                const MaybeTensor& running_mean, const MaybeTensor& running_var,
                                std::array<bool, 4> wanted) {
  Tensor dz = dy;
  if (static_cast<NormActivation>(activation) != NormActivation::kNone) {
    Tensor z = residual;
    if (!residual_is_output) {
      z = std::get<0>(at::native_batch_norm(x, or_none(weight), or_none(bias), running_mean,
                                            running_var, training, 0, eps));
      if (residual.defined()) z = at::add(z, residual);
    }
    dz = activate_backward(dy, z, activation, slope);
  }
  const auto [dx, dw, db] =
      at::native_batch_norm_backward(dz, x, or_none(weight), running_mean, running_var, mean,
                                     inverse, training, eps, {wanted[0], wanted[2], wanted[3]});
  return {dx, wanted[1] ? dz : Tensor(), dw, db};
}

// ------------------------------------------------------------------------------------------------
// derivatives

Op<Results(const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
           const MaybeTensor&, const MaybeTensor&, bool, double, int64_t, double)>
    forward_op;
Op<Results(const Tensor&, const Tensor&, const MaybeTensor&, bool, const MaybeTensor&,
           const MaybeTensor&, const Tensor&, const Tensor&, bool, double, int64_t, double, bool)>
    backward_op;

// saved: x, what stands for the residual, weight, bias, mean, inverse, variance.
// attributes: whether that is the output, training, eps, activation, slope.
variable_list vjp(const variable_list& grads, const BackwardContext& c) {
  if (!grads[0].defined()) return variable_list(4);
  const auto& s = c.saved;
  const bool is_output = c.values[0].toBool(), training = c.values[1].toBool();
  const double eps = c.values[2].toDouble(), slope = c.values[4].toDouble();
  const int64_t activation = c.values[3].toInt();
  if (!are_plain(grads[0], s[0], s[1], s[2], s[3])) {
    const MaybeTensor running_mean = training ? std::nullopt : MaybeTensor(s[4]),
                      running_var = training ? std::nullopt : MaybeTensor(s[6]);
    return composed_backward(grads[0], s[0], s[1], is_output, s[2], s[3], s[4], s[5], training, eps,
                             activation, slope, running_mean, running_var,
                             {c.wants(0), c.wants(1), c.wants(2), c.wants(3)});
  }
  auto [dx, dresidual, dweight, dbias] =
      backward_op.call(grads[0], s[0], or_none(s[1]), is_output, or_none(s[2]), or_none(s[3]), s[4],
                       s[5], training, eps, activation, slope, c.wants(1));
  return {c.wants(0) ? dx : Tensor(), c.wants(1) ? dresidual : Tensor(),
          c.wants(2) ? dweight : Tensor(), c.wants(3) ? dbias : Tensor()};
}

Results forward_autograd(DispatchKeySet ks, const Tensor& input, const MaybeTensor& residual,
                         const MaybeTensor& weight, const MaybeTensor& bias,
                         const MaybeTensor& running_mean, const MaybeTensor& running_var,
                         bool training, double eps, int64_t activation, double slope) {
  const Tensor r = or_undefined(residual), w = or_undefined(weight), b = or_undefined(bias);
  if (is_dual(input) || is_dual(r) || is_dual(w) || is_dual(b)) {
    // torch's ops know their tangents.
    auto [z, mean, inverse] =
        at::native_batch_norm(input, weight, bias, training ? std::nullopt : running_mean,
                              training ? std::nullopt : running_var, training, 0, eps);
    if (r.defined()) z = at::add(z, r);
    const Tensor m = training ? primal(mean).detach() : running_mean->clone(),
                 i = training ? primal(inverse).detach() : at::add(*running_var, eps).rsqrt();
    const Tensor v = at::sub(at::mul(i, i).reciprocal(), eps);
    return {activate(z, activation, slope), m, i, v};
  }
  Results out = forward_op.below_autograd(ks, input, residual, weight, bias, running_mean,
                                          running_var, training, eps, activation, slope);
  if (requires_grad(input, r, w, b)) {
    auto& [y, mean, inverse, variance] = out;
    const auto kind = static_cast<NormActivation>(activation);
    const bool by_output =
        r.defined() && (kind == NormActivation::kReLU || kind == NormActivation::kReLU6 ||
                        (kind == NormActivation::kLeakyReLU && slope > 0));
    Saved s;
    s.input(input);
    if (kind == NormActivation::kNone) {
      s.input(Tensor());
    } else if (by_output) {
      s.output(y);
    } else {
      s.input(r);
    }
    for (const Tensor* t : {&w, &b, &mean, &inverse, &variance}) s.input(*t);
    s.value(by_output, training, eps, activation, slope);
    static const Recipe recipe{"fastops::batch_norm_act", &vjp, nullptr};
    record(recipe, {&y}, edges_of({&input, &r, &w, &b}), s);
  }
  return out;
}

Results backward_autograd(DispatchKeySet ks, const Tensor& grad, const Tensor& input,
                          const MaybeTensor& residual, bool residual_is_output,
                          const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& mean,
                          const Tensor& inverse, bool training, double eps, int64_t activation,
                          double slope, bool to_residual) {
  const Tensor r = or_undefined(residual), w = or_undefined(weight), b = or_undefined(bias);
  if (requires_grad(grad, input, r, w, b) || is_dual(grad) || is_dual(input) || is_dual(r) ||
      is_dual(w) || is_dual(b)) {
    const Tensor variance = at::sub(at::mul(inverse, inverse).reciprocal(), eps);
    const MaybeTensor running_mean = training ? std::nullopt : MaybeTensor(mean),
                      running_var = training ? std::nullopt : MaybeTensor(variance);
    auto d = composed_backward(grad, input, r, residual_is_output, w, b, mean, inverse, training,
                               eps, activation, slope, running_mean, running_var,
                               {true, to_residual, true, true});
    if (!d[1].defined()) d[1] = at::empty({0}, input.options().memory_format(std::nullopt));
    return {d[0], d[1], d[2], d[3]};
  }
  return backward_op.below_autograd(ks, grad, input, residual, residual_is_output, weight, bias,
                                    mean, inverse, training, eps, activation, slope, to_residual);
}

}  // namespace

void register_batch_norm(torch::Library& m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "batch_norm_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor? running_mean, Tensor? running_var, bool training, float eps, int activation=0, "
      "float slope=0.01) -> (Tensor output, Tensor mean, Tensor inverse, Tensor variance)",
      tags);
  m.def(
      "batch_norm_act_backward(Tensor grad, Tensor input, Tensor? residual, "
      "bool residual_is_output, Tensor? weight, Tensor? bias, Tensor mean, Tensor inverse, "
      "bool training, float eps, int activation, float slope, bool to_residual) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      tags);
  for (const auto key : {DispatchKey::CPU, DispatchKey::CUDA}) {
    if (key == DispatchKey::CUDA && !cuda_built()) continue;
    m.impl("batch_norm_act", torch::dispatch(key, TORCH_FN(forward)));
    m.impl("batch_norm_act_backward", torch::dispatch(key, TORCH_FN(backward)));
  }
  m.impl("batch_norm_act", torch::dispatch(DispatchKey::Autograd, TORCH_FN(forward_autograd)));
  m.impl("batch_norm_act_backward",
         torch::dispatch(DispatchKey::Autograd, TORCH_FN(backward_autograd)));
  forward_op = decltype(forward_op)::of("batch_norm_act");
  backward_op = decltype(backward_op)::of("batch_norm_act_backward");
}

void bind_batch_norm(pybind11::module_& m) {
  def(m, kName,
      [](const Tensor& input, const MaybeTensor& residual, const MaybeTensor& weight,
         const MaybeTensor& bias, const MaybeTensor& running_mean, const MaybeTensor& running_var,
         bool training, double eps, int64_t activation, double slope) {
        return forward_op.call(input, residual, weight, bias, running_mean, running_var, training,
                               eps, activation, slope);
      });
}

}  // namespace fastops
