// Batch norm with the addition and the activation after it, as torch sees it: schemas, checks,
// layouts and derivatives. Gradients of gradients are made of torch's own ops. What takes() says
// the kernels do not take, fastops/functional/_batch_norm.py hands to torch.
#include <ATen/ops/add.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/tanh.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

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

// How x lies in memory. One position a channel is both: neighbors are channels then.
struct Layout {
  bool channels_last;
  at::MemoryFormat format;
};
Layout layout_of(const Tensor& x) {
  const bool rows = x.numel() == x.size(0) * x.size(1);
  if (x.is_contiguous()) return {rows, at::MemoryFormat::Contiguous};
  const at::MemoryFormat format = x.suggest_memory_format();
  return {rows || format != at::MemoryFormat::Contiguous, format};
}

BatchNormArgs arguments(const Tensor& x, bool channels_last, const MaybeTensor& weight,
                        const MaybeTensor& bias, const Tensor& mean, const Tensor& inverse,
                        int64_t activation, double slope) {
  BatchNormArgs a{};
  a.dtype = x.scalar_type();
  a.images = x.size(0);
  a.channels = x.size(1);
  a.positions = x.numel() / (a.images * a.channels);
  if (a.positions == 1) std::swap(a.images, a.positions);  // rows of channels
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
  check_dtype(kName, x);
  TORCH_CHECK(x.dim() >= 2, kName, ": expected an input of 2 dimensions or more, got ", x.sizes());
  TORCH_CHECK_NOT_IMPLEMENTED(x.numel() > 0, kName, ": an empty input is left to torch");
  const BatchNormKernel& k = tables(x.device().type()).batch_norm;
  TORCH_CHECK_NOT_IMPLEMENTED(k.forward, kName, ": no kernels for ", x.device().type());
  return k;
}

void check_activation(int64_t activation) {
  TORCH_CHECK_VALUE(activation >= 0 && activation <= static_cast<int64_t>(NormActivation::kMish),
                    kName, ": activation must be in [0, ",
                    static_cast<int64_t>(NormActivation::kMish), "], got ", activation);
}

// t, which op calls `what`, in the memory order of x.
Tensor beside(const char* what, const MaybeTensor& t, const Tensor& x) {
  if (!t || !t->defined()) return {};
  check_like(kName, what, *t, x);
  TORCH_CHECK(t->sizes() == x.sizes(), kName, ": expected a ", what, " of shape ", x.sizes(),
              ", got ", t->sizes());
  return matching(*t, x);
}

Tensor workspace_of(const BatchNormArgs& a, const Tensor& x) {
  return output_beside(x, {batch_norm_workspace(a.images, a.channels, a.positions)}, at::kByte);
}

// 1 / sqrt(variance + eps)
Tensor inverse_of(const Tensor& variance, double eps) {
  const Tensor inverse = output_beside(variance, variance.sizes(), variance.scalar_type());
  const auto invert = [&](auto zero) {
    using T = decltype(zero);
    const auto* v = variance.const_data_ptr<T>();
    auto* to = inverse.mutable_data_ptr<T>();
    for (int64_t c = 0; c < variance.numel(); ++c)
      to[c] = static_cast<T>(1 / std::sqrt(static_cast<double>(v[c]) + eps));
  };
  if (variance.scalar_type() == at::kDouble) {
    invert(double{});
  } else {
    invert(float{});
  }
  return inverse;
}

struct Forward {
  Results operator()(const Tensor& input, const MaybeTensor& residual, const MaybeTensor& weight,
                     const MaybeTensor& bias, const MaybeTensor& running_mean,
                     const MaybeTensor& running_var, bool training, double eps, int64_t activation,
                     double slope) const {
    const BatchNormKernel& k = kernel(input);
    check_activation(activation);
    const c10::DeviceGuard guard(input.device());
    const Layout layout = layout_of(input);
    const Tensor x = input.contiguous(layout.format), r = beside("residual", residual, x);
    const MaybeTensor w = per_channel("weight", weight, x), b = per_channel("bias", bias, x);
    const auto vector = [&] { return output_beside(x, {x.size(1)}, real_of(x.scalar_type())); };
    const Tensor mean = vector(), variance = vector();
    if (training) {
      BatchNormArgs a = arguments(x, layout.channels_last, {}, {}, {}, {}, 0, 0);
      const Tensor workspace = workspace_of(a, x);
      a.totals[0] = mean.mutable_data_ptr();
      a.totals[1] = variance.mutable_data_ptr();
      a.workspace = workspace.mutable_data_ptr();
      check(kName, k.statistics(a));
    } else {
      TORCH_CHECK(running_mean && running_var, kName,
                  ": running statistics are needed outside of training");
      // Copies: the running ones may change before the backward pass.
      mean.copy_(*per_channel("running_mean", running_mean, x));
      variance.copy_(*per_channel("running_var", running_var, x));
    }
    const Tensor inverse = inverse_of(variance, eps);
    Tensor y = output_like(x);
    BatchNormArgs a = arguments(x, layout.channels_last, w, b, mean, inverse, activation, slope);
    a.residual = r.defined() ? r.const_data_ptr() : nullptr;
    a.y = y.mutable_data_ptr();
    check(kName, k.forward(a));
    return {y, mean, inverse, variance};
  }
};

// `residual` is the output where `residual_is_output`. The gradients to the input and to the
// residual are empty where they are not wanted.
struct Backward {
  Results operator()(const Tensor& grad, const Tensor& input, const MaybeTensor& residual,
                     bool residual_is_output, const MaybeTensor& weight, const MaybeTensor& bias,
                     const Tensor& mean, const Tensor& inverse, bool training, int64_t activation,
                     double slope, bool to_input, bool to_residual) const {
    const BatchNormKernel& k = kernel(input);
    check_activation(activation);
    const c10::DeviceGuard guard(input.device());
    const Layout layout = layout_of(input);
    const Tensor x = input.contiguous(layout.format), dy = beside("grad", grad, x),
                 r = beside("residual", residual, x);
    const MaybeTensor w = per_channel("weight", weight, x), b = per_channel("bias", bias, x),
                      m = per_channel("mean", mean, x), i = per_channel("inverse", inverse, x);
    BatchNormArgs a = arguments(x, layout.channels_last, w, b, *m, *i, activation, slope);
    a.dy = dy.const_data_ptr();
    a.residual = r.defined() ? r.const_data_ptr() : nullptr;
    a.residual_is_output = residual_is_output;
    const auto none = [&] { return output_beside(x, {0}, x.scalar_type()); };
    Tensor dbias = output_beside(x, {x.size(1)}, m->scalar_type()),
           dweight = output_beside(x, {x.size(1)}, m->scalar_type());
    const Tensor workspace = workspace_of(a, x);
    a.totals[0] = dbias.mutable_data_ptr();
    a.totals[1] = dweight.mutable_data_ptr();
    a.workspace = workspace.mutable_data_ptr();
    check(kName, k.sums(a));
    Tensor dx = to_input || to_residual ? output_like(x) : none(),
           dresidual = to_residual ? output_like(x) : none();
    if (to_input || to_residual) {
      a.dx = dx.mutable_data_ptr();
      a.dresidual = to_residual ? dresidual.mutable_data_ptr() : nullptr;
      if (!training) a.totals[0] = a.totals[1] = nullptr;
      check(kName, k.backward(a));
    }
    dweight.mul_(*i);
    if (weight && weight->defined()) dweight = as_dtype(dweight, weight->scalar_type());
    if (bias && bias->defined()) dbias = as_dtype(dbias, bias->scalar_type());
    return {dx, dresidual, dweight, dbias};
  }
};

// ------------------------------------------------------------------------------------------------
// in torch's own ops

// Of torch's own, no derivative is known.
Tensor differentiable_silu_backward(const Tensor& dy, const Tensor& z) {
  const Tensor s = at::sigmoid(z);
  return at::mul(dy, at::mul(s, at::add(at::mul(z, at::rsub(s, 1)), 1)));
}
Tensor differentiable_mish_backward(const Tensor& dy, const Tensor& z) {
  const Tensor t = at::tanh(at::softplus(z)), s = at::sigmoid(z);
  return at::mul(dy, at::add(t, at::mul(at::mul(z, s), at::rsub(at::mul(t, t), 1))));
}

Tensor activate_backward(const Tensor& dy, const Tensor& z, int64_t activation, double slope) {
  switch (static_cast<NormActivation>(activation)) {
    case NormActivation::kNone:
      return dy;
    case NormActivation::kReLU:
      return at::mul(dy, at::gt(z, 0));
    case NormActivation::kReLU6:
      return at::mul(dy, at::logical_and(at::gt(z, 0), at::lt(z, 6)));
    case NormActivation::kLeakyReLU:
      return at::leaky_relu_backward(dy, z, slope, false);
    case NormActivation::kSiLU:
      return differentiable_silu_backward(dy, z);
    case NormActivation::kGELU:
      return at::gelu_backward(dy, z);
    case NormActivation::kHardswish:
      return at::hardswish_backward(dy, z);
    case NormActivation::kMish:
      return differentiable_mish_backward(dy, z);
  }
  return dy;
}

// What backward finds: attributes by position, and `saved` below.
struct Attributes {
  bool by_output, training;
  double eps;
  int64_t activation;
  double slope;

  void save(Saved& s) const { s.value(by_output, training, eps, activation, slope); }
  explicit Attributes(const BackwardContext& c)
      : by_output(c.values[0].toBool()),
        training(c.values[1].toBool()),
        eps(c.values[2].toDouble()),
        activation(c.values[3].toInt()),
        slope(c.values[4].toDouble()) {}
  Attributes(bool output, bool train, double e, int64_t act, double s)
      : by_output(output), training(train), eps(e), activation(act), slope(s) {}
};
// The second is the residual or the output. The bias is there where the activation's input is made
// again.
enum Position { kInput, kResidual, kWeight, kBias, kMean, kInverse, kVariance };

// Of all that the gradient is computed from; differentiable. In real, so that what is rounded is
// the result alone.
variable_list composed_backward(const Tensor& grad, at::ArrayRef<Tensor> saved, const Attributes& a,
                                std::array<bool, 4> wanted) {
  const auto real = real_of(saved[kInput].scalar_type());
  const auto cast = [&](const Tensor& t) { return t.defined() ? as_dtype(t, real) : t; };
  const Tensor x = cast(saved[kInput]), r = cast(saved[kResidual]), w = cast(saved[kWeight]),
               b = cast(saved[kBias]);
  const MaybeTensor mean = a.training ? std::nullopt : MaybeTensor(saved[kMean]),
                    variance = a.training ? std::nullopt : MaybeTensor(saved[kVariance]);
  Tensor dz = cast(grad);
  if (static_cast<NormActivation>(a.activation) != NormActivation::kNone) {
    Tensor z = r;
    if (!a.by_output) {
      z = std::get<0>(at::native_batch_norm(x, or_none(w), or_none(b), mean, variance, a.training,
                                            /*momentum=*/0, a.eps));
      if (r.defined()) z = at::add(z, r);
    }
    dz = activate_backward(dz, z, a.activation, a.slope);
  }
  auto [dx, dw, db] = at::native_batch_norm_backward(
      dz, x, or_none(w), mean, variance, saved[kMean], saved[kInverse], a.training, a.eps,
      {wanted[kInput], wanted[kWeight], wanted[kBias]});
  const auto back = [](const Tensor& t, at::ScalarType dtype) {
    return t.defined() ? as_dtype(t, dtype) : t;
  };
  const auto dtype = saved[kInput].scalar_type();
  // Only the bias is not always there; it has the weight's dtype where both are.
  const auto of_vectors = saved[kWeight].defined() ? saved[kWeight].scalar_type() : dtype;
  return {back(dx, dtype), wanted[kResidual] ? back(dz, dtype) : Tensor(), back(dw, of_vectors),
          back(db, of_vectors)};
}

// ------------------------------------------------------------------------------------------------
// derivatives

Op<Results(const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
           const MaybeTensor&, const MaybeTensor&, bool, double, int64_t, double)>
    forward_op;
Op<Results(const Tensor&, const Tensor&, const MaybeTensor&, bool, const MaybeTensor&,
           const MaybeTensor&, const Tensor&, const Tensor&, bool, int64_t, double, bool, bool)>
    backward_op;

variable_list vjp(const variable_list& grads, const BackwardContext& c) {
  if (!grads[0].defined()) return variable_list(4);
  const auto& s = c.saved;
  const Attributes a(c);
  const std::array<bool, 4> wanted{c.wants(0), c.wants(1), c.wants(2), c.wants(3)};
  if (!are_plain(grads[0], s[kInput], s[kResidual], s[kWeight], s[kBias]))
    return composed_backward(grads[0], s, a, wanted);
  auto [dx, dresidual, dweight, dbias] =
      backward_op.call(grads[0], s[kInput], or_none(s[kResidual]), a.by_output, or_none(s[kWeight]),
                       or_none(s[kBias]), s[kMean], s[kInverse], a.training, a.activation, a.slope,
                       wanted[kInput], wanted[kResidual]);
  return {wanted[kInput] ? dx : Tensor(), wanted[kResidual] ? dresidual : Tensor(),
          wanted[kWeight] ? dweight : Tensor(), wanted[kBias] ? dbias : Tensor()};
}

struct ForwardAutograd {
  Results operator()(DispatchKeySet ks, const Tensor& input, const MaybeTensor& residual,
                     const MaybeTensor& weight, const MaybeTensor& bias,
                     const MaybeTensor& running_mean, const MaybeTensor& running_var, bool training,
                     double eps, int64_t activation, double slope) const {
    const Tensor r = or_undefined(residual), w = or_undefined(weight), b = or_undefined(bias);
    TORCH_CHECK_NOT_IMPLEMENTED(!call_args::any_dual(input, r, w, b), "forward-mode derivative of ",
                                forward_op.name, " is not implemented");
    Results out = forward_op.below_autograd(ks, input, residual, weight, bias, running_mean,
                                            running_var, training, eps, activation, slope);
    if (!requires_grad(input, r, w, b)) return out;
    const auto& [y, mean, inverse, variance] = out;
    const auto kind = static_cast<NormActivation>(activation);
    const bool linear = kind == NormActivation::kNone;
    const bool by_output =
        r.defined() && (kind == NormActivation::kReLU || kind == NormActivation::kReLU6 ||
                        (kind == NormActivation::kLeakyReLU && slope > 0));
    Saved s;
    s.input(input);
    by_output ? s.output(y) : s.input(linear ? Tensor() : r);
    s.input(w);
    s.input(linear || by_output ? Tensor() : b);
    s.input(mean);
    s.input(inverse);
    s.input(training ? Tensor() : variance);
    Attributes(by_output, training, eps, activation, slope).save(s);
    record({forward_op.name, &vjp, nullptr}, {&y}, edges_of({&input, &r, &w, &b}), s);
    return out;
  }
};

// ------------------------------------------------------------------------------------------------
// running statistics

// running (1 - momentum) + batch momentum
void average(const Tensor& running, const Tensor& batch, double momentum, double scale) {
  const auto real = batch.scalar_type();
  const Tensor sum = as_dtype(running, real);  // rounded once
  sum.mul_(1 - momentum).add_(batch, momentum * scale);
  if (!sum.is_same(running)) running.copy_(sum);
}

// ------------------------------------------------------------------------------------------------
// what the kernels take

// An ordinary tensor that they read, or a FakeTensor of one: no other subclass, nothing that is
// traced, batched or has a tangent. (isTensorSubclassLike() would also ask for a mode, which may
// watch a kernel.)
bool is_ordinary(const Tensor& t) {
  const auto keys = t.key_set();
  const bool fake =
      keys.has(DispatchKey::Python) && t.has_storage() && t.storage().device_type() == at::kMeta;
  return t.layout() == at::kStrided && t.is_cpu() &&
         (fake || !keys.has_any(at::kTensorSubclassLike)) &&
         !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && !t.is_nested() && !is_dual(t);
}

bool has_kernels(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
         dtype == at::kBFloat16;
}

// Of the vectors the running statistics are the last two.
bool takes(const Tensor& x, const MaybeTensor& residual,
           const std::array<const MaybeTensor*, 4>& vectors, bool training) {
  constexpr auto kTransforms = DispatchKey::FuncTorchDynamicLayerFrontMode;
  if (!is_ordinary(x) || !has_kernels(x.scalar_type()) || x.dim() < 2 ||
      x.numel() <= (training ? x.size(1) : 0) ||
      c10::impl::tls_is_dispatch_key_included(kTransforms))
    return false;
  const bool half = x.scalar_type() != at::kDouble && x.scalar_type() != at::kFloat;
  std::optional<at::ScalarType> dtype;
  for (const MaybeTensor* v : vectors) {
    if (!*v) continue;
    const Tensor& t = **v;
    if (!is_ordinary(t) || t.dim() != 1 || t.size(0) != x.size(1)) return false;
    if (dtype.value_or(t.scalar_type()) != t.scalar_type()) return false;
    dtype = t.scalar_type();
  }
  if (dtype && dtype != x.scalar_type() && !(half && dtype == at::kFloat)) return false;
  const MaybeTensor &mean = *vectors[2], &variance = *vectors[3];
  if (mean.has_value() != variance.has_value() || (!mean && !training) ||
      (mean && (mean->requires_grad() || variance->requires_grad())))
    return false;
  return !residual || (is_ordinary(*residual) && residual->scalar_type() == x.scalar_type() &&
                       residual->sizes() == x.sizes());
}

}  // namespace

void register_batch_norm(torch::Library& m) {
  Registration(m, forward_op, kName,
               "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? "
               "running_mean, Tensor? running_var, bool training, float eps, int activation=0, "
               "float slope=0.01) -> (Tensor output, Tensor mean, Tensor inverse, Tensor variance)")
      .kernel(Forward{})
      .on(DispatchKey::Autograd, ForwardAutograd{});
  Registration(m, backward_op, std::string(kName) + "_backward",
               "(Tensor grad, Tensor input, Tensor? residual, bool residual_is_output, Tensor? "
               "weight, Tensor? bias, Tensor mean, Tensor inverse, bool training, int activation, "
               "float slope, bool to_input, bool to_residual) -> (Tensor, Tensor, Tensor, Tensor)")
      .kernel(Backward{})
      .not_differentiable();
}

void bind_batch_norm(pybind11::module_& m) {
  // None where the kernels do not take the call. Running statistics, where there are some, are
  // updated in training.
  m.def(kName,
        [](const Tensor& input, const MaybeTensor& residual, const MaybeTensor& weight,
           const MaybeTensor& bias, const MaybeTensor& running_mean, const MaybeTensor& running_var,
           bool training, double momentum, double eps, int64_t activation,
           double slope) -> MaybeTensor {
          const bool positive = training ? eps > 0 : eps >= 0;  // else torch's error
          if (!positive ||
              !takes(input, residual, {&weight, &bias, &running_mean, &running_var}, training))
            return std::nullopt;
          const Unlocked unlocked(input);
          const auto [y, mean, inverse, variance] =
              forward_op.call(input, residual, weight, bias, running_mean, running_var, training,
                              eps, activation, slope);
          if (training && running_mean) {
            const at::NoGradGuard no_grad;
            const double count = static_cast<double>(input.numel() / input.size(1));
            average(*running_mean, mean, momentum, 1);
            average(*running_var, variance, momentum, count / (count - 1));
          }
          return y;
        });
}

}  // namespace fastops
