// Softmax, log-softmax and cross-entropy as torch sees them: schemas, checks and derivatives.
//
// cross_entropy_forward computes the loss and, in the same visit of the logits, its gradient, and
// gives both out; the backward pass then has next to nothing to do, and no more is saved than the
// gradient itself. Where a gradient of the gradient is asked for, the softmax is recovered from it
// (see RowTerms). cross_entropy_lse gives each row's log(sum(exp)) as well, and cross_entropy_
// leaves the gradient in the logits' own memory.
#include <ATen/MemoryOverlap.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>

#include "autocast.h"
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

// ------------------------------------------------------------------------------------------------
// softmax

struct SoftmaxOps {
  c10::TypedOperatorHandle<Tensor(const Tensor&, int64_t)> forward;
  c10::TypedOperatorHandle<Tensor(const Tensor&, const Tensor&, int64_t)>
      backward;  // (grad, output, dim)
};

const KernelTable<SoftmaxKernel>& softmax_table(c10::DeviceType device) {
  return tables(device).softmax;
}
std::string softmax_name(size_t row) { return softmax_table(c10::DeviceType::CPU).data[row].name; }

const SoftmaxOps& softmax_ops(size_t row) {
  static const auto all = [] {
    std::vector<SoftmaxOps> ops;
    for (const auto& r : softmax_table(c10::DeviceType::CPU)) {
      const std::string n = r.name;
      ops.push_back({find_op<Tensor(const Tensor&, int64_t)>(n),
                     find_op<Tensor(const Tensor&, const Tensor&, int64_t)>(n + "_backward")});
    }
    return ops;
  }();
  return all[row];
}

bool is_log(size_t row) { return softmax_name(row) == "log_softmax"; }

struct SoftmaxForward {
  size_t row;
  Tensor operator()(const Tensor& input, int64_t dim) {
    const std::string name = softmax_name(row);
    check_dtype(name.c_str(), input);
    const int64_t d = at::maybe_wrap_dim(dim, input.dim());
    const Tensor x = dense(input);
    Tensor y = x.is_same(input) ? output_like(x) : x;
    if (x.numel() == 0) return y;
    const c10::DeviceGuard guard(x.device());
    const Rows3 r = around(x, d);
    check(name.c_str(), softmax_table(x.device().type())
                            .data[row]
                            .forward({x.scalar_type(),
                                      r.outer,
                                      r.n,
                                      r.inner,
                                      y.mutable_data_ptr(),
                                      {x.const_data_ptr(), nullptr},
                                      stream_of(x)}));
    return y;
  }
};

struct SoftmaxBackward {
  size_t row;
  Tensor operator()(const Tensor& grad, const Tensor& output, int64_t dim) {
    const std::string name = softmax_name(row) + "_backward";
    TORCH_CHECK(grad.sizes() == output.sizes() && grad.scalar_type() == output.scalar_type() &&
                    grad.device() == output.device(),
                name, ": expected grad like output ", output.toString(), output.sizes(), ", got ",
                grad.toString(), grad.sizes());
    check_dtype(name.c_str(), output);
    const int64_t d = at::maybe_wrap_dim(dim, output.dim());
    const Tensor y = dense(output), dy = matching(grad, y);
    Tensor dx = output_like(y);
    if (y.numel() == 0) return dx;
    const c10::DeviceGuard guard(y.device());
    const Rows3 r = around(y, d);
    check(name.c_str(), softmax_table(y.device().type())
                            .data[row]
                            .backward({y.scalar_type(),
                                       r.outer,
                                       r.n,
                                       r.inner,
                                       dx.mutable_data_ptr(),
                                       {y.const_data_ptr(), dy.const_data_ptr()},
                                       stream_of(y)}));
    return dx;
  }
};

variable_list softmax_vjp(const variable_list& grads, const BackwardContext& c) {
  return {softmax_ops(c.attributes[0].toInt())
              .backward.call(grads[0], c.saved[0], c.attributes[1].toInt())};
}

// d backward(dy, y) / dy, applied to v, and to y; in torch ops, so that it can be differentiated
// without end.
Tensor softmax_backward_dy(bool log, const Tensor& v, const Tensor& y, int64_t dim) {
  if (log) return v - (v * y.exp()).sum(dim, true);
  return y * (v - (y * v).sum(dim, true));
}
Tensor softmax_backward_y(bool log, const Tensor& v, const Tensor& dy, const Tensor& y,
                          int64_t dim) {
  if (log) return -(v * y.exp() * dy.sum(dim, true));
  return v * (dy - (y * dy).sum(dim, true)) - dy * (v * y).sum(dim, true);
}

variable_list softmax_backward_vjp(const variable_list& grads, const BackwardContext& c) {
  const bool log = is_log(c.attributes[0].toInt());
  const int64_t dim = c.attributes[1].toInt();
  variable_list result(2);
  if (c.needed[0]) result[0] = softmax_backward_dy(log, grads[0], c.saved[1], dim);
  if (c.needed[1]) result[1] = softmax_backward_y(log, grads[0], c.saved[0], c.saved[1], dim);
  return result;
}

struct SoftmaxForwardAutograd {
  size_t row;
  Tensor operator()(DispatchKeySet ks, const Tensor& input, int64_t dim) {
    const auto& op = softmax_ops(row);
    Tensor y;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      y = op.forward.redispatch(ks & c10::after_autograd_keyset, input, dim);
    }
    Tensor dy;
    if (is_dual(input)) {  // softmax's Jacobian is symmetric, log-softmax's is not
      const Tensor t = tangent(input);
      dy = is_log(row) ? t - (t * y.exp()).sum(dim, true) : op.backward.call(t, y, dim);
    }
    set_tangent(y, dy);
    if (requires_grad(input))
      record(("fastops::" + softmax_name(row)).c_str(), &softmax_vjp, {y}, {input}, {{y, true}},
             {static_cast<int64_t>(row), dim});
    return y;
  }
};

struct SoftmaxBackwardAutograd {
  size_t row;
  Tensor operator()(DispatchKeySet ks, const Tensor& grad, const Tensor& output, int64_t dim) {
    const auto& op = softmax_ops(row);
    Tensor dx;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      dx = op.backward.redispatch(ks & c10::after_autograd_keyset, grad, output, dim);
    }
    Tensor t;
    if (is_dual(grad)) t = op.backward.call(tangent(grad), primal(output), dim);
    if (is_dual(output)) {
      const Tensor y = primal(output), dy = primal(grad), ty = tangent(output);
      const Tensor s = is_log(row)
                           ? -(y.exp() * ty * dy.sum(dim, true))
                           : ty * (dy - (y * dy).sum(dim, true)) - y * (ty * dy).sum(dim, true);
      t = t.defined() ? at::add(t, s) : s;
    }
    set_tangent(dx, t);
    if (requires_grad(grad, output))
      record(("fastops::" + softmax_name(row) + "_backward").c_str(), &softmax_backward_vjp, {dx},
             {grad, output}, {{grad}, {output}}, {static_cast<int64_t>(row), dim});
    return dx;
  }
};

struct SoftmaxAutocast {
  size_t row;
  DispatchKey key;
  Tensor operator()(const Tensor& input, int64_t dim) {
    return in_float32(key, input,
                      [&](const Tensor& x) { return softmax_ops(row).forward.call(x, dim); });
  }
};

// ------------------------------------------------------------------------------------------------
// cross-entropy

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&,
                                           const std::optional<Tensor>&, int64_t, int64_t, double,
                                           bool, const std::optional<Tensor>&, double);
using Whole = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t, int64_t,
                     double, bool, const std::optional<Tensor>&, double);
using WithLse = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                   const std::optional<Tensor>&, int64_t, int64_t,
                                                   double, bool, double, bool, bool);
using Overwriting = std::tuple<Tensor, Tensor>(Tensor&, const Tensor&, const std::optional<Tensor>&,
                                               int64_t, int64_t, double, bool, double);
auto forward_op() {
  static const auto op = find_op<Forward>("cross_entropy_forward");
  return op;
}
auto whole_op() {
  static const auto op = find_op<Whole>("cross_entropy");
  return op;
}

auto lse_op() {
  static const auto op = find_op<WithLse>("cross_entropy_lse");
  return op;
}
auto overwriting_op() {
  static const auto op = find_op<Overwriting>("cross_entropy_");
  return op;
}

struct Problem {
  Tensor x, weight;  // dense logits, weights in real
  Rows3 rows;
  std::vector<int64_t> result_sizes;
};

// Whether targets are probabilities, one per class, rather than class indices.
bool is_distribution(const Tensor& target) { return at::isFloatingType(target.scalar_type()); }

// The sizes of logits without their classes.
std::vector<int64_t> row_sizes(const Tensor& input) {
  auto sizes = input.sizes().vec();
  sizes.erase(sizes.begin() + (input.dim() == 1 ? 0 : 1));
  return sizes;
}

void check_target(const Tensor& input, const Tensor& target, int64_t ignore_index) {
  if (input.dim() > 1 && target.dim() >= 1)
    TORCH_CHECK_VALUE(input.size(0) == target.size(0), "Expected input batch_size (", input.size(0),
                      ") to match target batch_size (", target.size(0), ").");
  if (is_distribution(target)) {
    TORCH_CHECK(target.sizes() == input.sizes(),
                "cross_entropy: expected class probabilities of size ", input.sizes(),
                " like the logits, got ", target.sizes(), "; class indices are int64");
    TORCH_CHECK(target.scalar_type() == input.scalar_type(),
                "cross_entropy: expected class probabilities of the logits' dtype ",
                c10::toString(input.scalar_type()), ", got ", c10::toString(target.scalar_type()));
    TORCH_CHECK(ignore_index < 0, "ignore_index is not supported for floating point target");
  } else {
    const auto expected = row_sizes(input);
    TORCH_CHECK(target.sizes() == c10::IntArrayRef(expected),
                "cross_entropy: expected a target of size ", c10::IntArrayRef(expected),
                " for logits of size ", input.sizes(), ", got ", target.sizes());
    TORCH_CHECK(target.scalar_type() == at::kLong || target.scalar_type() == at::kByte,
                "cross_entropy: expected class indices of dtype int64 or uint8, got ",
                c10::toString(target.scalar_type()), "; use target.long()");
  }
  TORCH_CHECK(target.device() == input.device(),
              "cross_entropy: expected logits and target on one device, got ", input.device(),
              " and ", target.device());
}

// autocast: a weight of another dtype will do where both can be brought to float32
Problem problem(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                int64_t reduction, int64_t ignore_index, double label_smoothing, bool autocast) {
  check_reduction("cross_entropy", reduction);
  check_dtype("cross_entropy", input);
  TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1,
              "label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
  TORCH_CHECK_VALUE(input.dim() >= 1,
                    "cross_entropy: expected logits of 1 or more dimensions, (C), (N, C) or (N, C, "
                    "d1, ...); got ",
                    input.dim());
  const int64_t dim = input.dim() == 1 ? 0 : 1, n = input.size(dim);
  check_target(input, target, ignore_index);
  Problem p;
  if (weight && weight->defined()) {
    TORCH_CHECK(weight->dim() == 1 && weight->numel() == n,
                "cross_entropy: weight tensor should be defined either for all ", n,
                " classes or no classes but got weight tensor of shape: ", weight->sizes());
    const auto to_float = [](at::ScalarType t) {
      return at::isFloatingType(t) && t != at::kDouble;
    };
    TORCH_CHECK(weight->scalar_type() == input.scalar_type() ||
                    (autocast && to_float(weight->scalar_type()) && to_float(input.scalar_type())),
                "cross_entropy: expected a weight of the logits' dtype ",
                c10::toString(input.scalar_type()), ", got ", c10::toString(weight->scalar_type()),
                "; use weight.to(input.dtype)");
    TORCH_CHECK(weight->device() == input.device(),
                "cross_entropy: expected logits and weight on one device, got ", input.device(),
                " and ", weight->device());
    p.weight = weight->to(real_of(input.scalar_type())).contiguous();
  }
  p.x = dense(input);
  p.rows = around(p.x, dim);
  p.result_sizes = row_sizes(input);
  return p;
}

struct Computed {
  Tensor loss, grad, lse;
};

// What cross_entropy can do beside a loss.
struct Extras {
  bool lse = false;
  double z_loss = 0;
  bool overwrite = false;     // the gradient goes where the logits are
  Tensor second_target = {};  // of mixup; then lam is the part of the first
  double lam = 1;
};
Extras mixed(const std::optional<Tensor>& second_target, double lam) {
  return {.second_target = second_target.value_or(Tensor()), .lam = lam};
}

Computed compute(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                 int64_t reduction, int64_t ignore_index, double label_smoothing, bool upcast,
                 bool with_grad, const Extras& extras) {
  TORCH_CHECK_VALUE(std::isfinite(extras.z_loss) && extras.z_loss >= 0,
                    "cross_entropy: z_loss must be a finite number and not negative, got ",
                    extras.z_loss);
  if (extras.overwrite) {
    TORCH_CHECK(input.is_non_overlapping_and_dense(),
                "cross_entropy: inplace_backward=True needs dense logits, got sizes ",
                input.sizes(), " with strides ", input.strides(),
                "; make them contiguous, or leave it off");
    at::assert_no_overlap(input, target);
  }
  const int64_t dim = input.dim() <= 1 ? 0 : 1;
  Problem p =
      problem(input, target, weight, reduction, ignore_index, label_smoothing, /*autocast=*/upcast);
  const Tensor& second_target = extras.second_target;
  if (second_target.defined()) {
    check_target(input, second_target, ignore_index);
    TORCH_CHECK(!is_distribution(target) && !is_distribution(second_target),
                "cross_entropy: two targets have to be class indices");
  }
  const auto real = real_of(p.x.scalar_type()), dtype = upcast ? real : p.x.scalar_type();
  const auto options = p.x.options().dtype(real);
  const c10::DeviceGuard guard(p.x.device());
  const auto& row = tables(p.x.device().type()).cross_entropy.data[0];

  Computed result;
  if (with_grad)
    result.grad = extras.overwrite   ? p.x
                  : p.x.numel() == 0 ? at::zeros_like(p.x)
                                     : output_like(p.x);
  if (p.x.numel() == 0) {  // no rows, or rows of no classes
    TORCH_CHECK(target.numel() == 0, "cross_entropy: logits of size ", input.sizes(),
                " have no classes");
    result.loss = reduction == at::Reduction::None
                      ? at::zeros(p.result_sizes, options)
                      : at::zeros({}, options).div_(reduction == at::Reduction::Mean ? 0.0 : 1.0);
    result.loss = result.loss.to(dtype);
    if (extras.lse) result.lse = at::zeros(p.result_sizes, options);
    return result;
  }

  // Losses and targets stand row by row in the logits' memory order: that of a dense tensor with
  // one dimension cut out.
  auto strides = p.x.strides().vec();
  strides.erase(strides.begin() + dim);
  for (auto& s : strides)
    if (s >= p.rows.n * p.rows.inner) s /= p.rows.n;
  const bool distribution = is_distribution(target);
  const auto classes = [&](const Tensor& t) {
    const Tensor index = as_dtype(t, at::kLong);
    if (index.strides() == c10::IntArrayRef(strides)) return index;
    return at::empty_strided(p.result_sizes, strides, index.options()).copy_(index);
  };
  const Tensor index = distribution ? matching(target, p.x) : classes(target);
  const Tensor second = second_target.defined() ? classes(second_target) : Tensor();
  const Tensor losses = output_beside(p.x, {p.rows.outer * p.rows.inner}, real);
  const Tensor lse = extras.lse ? output_like(losses) : Tensor();

  CrossEntropyArgs a{};
  a.dtype = p.x.scalar_type();
  a.outer = p.rows.outer;
  a.n = p.rows.n;
  a.inner = p.rows.inner;
  a.x = p.x.const_data_ptr();
  if (distribution) {
    a.probability = index.const_data_ptr();
  } else {
    a.target = index.const_data_ptr<int64_t>();
  }
  a.weight = p.weight.defined() ? p.weight.const_data_ptr() : nullptr;
  a.ignore_index = ignore_index;
  a.label_smoothing = label_smoothing;
  a.z_loss = extras.z_loss;
  a.loss = losses.mutable_data_ptr();
  a.lse = extras.lse ? lse.mutable_data_ptr() : nullptr;
  a.scale = 1;
  a.stream = stream_of(p.x);

  const bool mean = reduction == at::Reduction::Mean;
  double scale = 1;
  if (distribution && mean) scale = 1 / static_cast<double>(losses.numel());
  const auto divisor_of_rows = [&](const Tensor& classes) {
    CrossEntropyArgs b = a;
    b.target = classes.const_data_ptr<int64_t>();
    const Tensor divisor = output_beside(p.x, {}, real);
    int64_t bad_row = -1;
    check("cross_entropy", row.divisor(b, divisor.mutable_data_ptr(), &bad_row));
    if (bad_row >= 0) {
      const Tensor flat = classes.as_strided({losses.numel()}, {1});
      TORCH_CHECK_INDEX(false, "cross_entropy: target ", flat[bad_row].item<int64_t>(), " at row ",
                        bad_row, " is out of range for ", a.n,
                        " classes (ignore_index=", ignore_index, ")");
    }
    return divisor;
  };
  const Tensor divisor = distribution ? Tensor() : divisor_of_rows(index);
  const Tensor second_divisor = second.defined() ? divisor_of_rows(second) : Tensor();
  if (second.defined()) {  // whose divisors are applied where the two losses are added
    a.second_target = second.const_data_ptr<int64_t>();
    a.lam = extras.lam;
    if (mean) {
      a.divisor = divisor.const_data_ptr();
      a.second_divisor = second_divisor.const_data_ptr();
    }
  }
  if (with_grad) {
    a.grad = result.grad.mutable_data_ptr();
    // float16 cannot hold gradients divided by a large batch: they are left as they are, see
    // scale_of_saved().
    const bool half = p.x.scalar_type() == at::kHalf;
    if (mean && second.defined()) {
      if (half) a.scale = static_cast<double>(losses.numel());
    } else if (mean && !half) {
      a.divisor = divisor.defined() ? divisor.const_data_ptr() : nullptr;
      a.scale = scale;
    }
  }
  check("cross_entropy", (distribution ? row.forward_probability : row.forward)(a));
  if (reduction == at::Reduction::None) {
    result.loss = as_dtype(losses.as_strided(p.result_sizes, strides).contiguous(), dtype);
  } else {
    result.loss =
        as_dtype(sum_of(losses, scale, mean && !second.defined() ? divisor : Tensor()), dtype);
  }
  if (extras.lse) result.lse = lse.as_strided(p.result_sizes, strides).contiguous();
  return result;
}

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& input, const Tensor& target,
                                                 const std::optional<Tensor>& weight,
                                                 int64_t reduction, int64_t ignore_index,
                                                 double label_smoothing, bool upcast,
                                                 const std::optional<Tensor>& second_target,
                                                 double lam) {
  Computed c = compute(input, target, weight, reduction, ignore_index, label_smoothing, upcast,
                       true, mixed(second_target, lam));
  return {c.loss, c.grad};
}

Tensor cross_entropy(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                     int64_t reduction, int64_t ignore_index, double label_smoothing, bool upcast,
                     const std::optional<Tensor>& second_target, double lam) {
  return compute(input, target, weight, reduction, ignore_index, label_smoothing, upcast, false,
                 mixed(second_target, lam))
      .loss;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_lse(const Tensor& input, const Tensor& target,
                                                     const std::optional<Tensor>& weight,
                                                     int64_t reduction, int64_t ignore_index,
                                                     double label_smoothing, bool upcast,
                                                     double z_loss, bool, bool with_grad) {
  Computed c = compute(input, target, weight, reduction, ignore_index, label_smoothing, upcast,
                       with_grad, {.lse = true, .z_loss = z_loss});
  return {c.loss, c.lse, with_grad ? c.grad : at::empty({0}, input.options())};
}

std::tuple<Tensor, Tensor> cross_entropy_overwriting(Tensor& input, const Tensor& target,
                                                     const std::optional<Tensor>& weight,
                                                     int64_t reduction, int64_t ignore_index,
                                                     double label_smoothing, bool upcast,
                                                     double z_loss) {
  Computed c = compute(input, target, weight, reduction, ignore_index, label_smoothing, upcast,
                       true, {.lse = true, .z_loss = z_loss, .overwrite = true});
  return {c.loss, c.lse};
}

// -- derivatives, in torch ops but for the common case. `grad` is the second output of
// cross_entropy_forward.

struct Attributes {
  int64_t reduction, ignore_index;
  double label_smoothing;
  bool exclusive;  // nobody else can see the saved gradient: it may be handed on or overwritten
  double z_loss = 0;
  bool mixed = false;  // of two targets, of which lam is the part of the first
  double lam = 1;
};

Tensor live_rows(const Tensor& target, int64_t ignore_index) { return target.ne(ignore_index); }

// sum of the weights of the rows that count
Tensor divisor_of(const Tensor& target, const Tensor& weight, const Attributes& a,
                  at::TensorOptions options) {
  const Tensor live = live_rows(target, a.ignore_index);
  if (!weight.defined()) return live.sum().to(options.dtype());
  const Tensor w = weight.to(options.dtype())
                       .index_select(0, at::where(live, target, 0).to(at::kLong).reshape(-1));
  return (w * live.reshape(-1).to(options.dtype())).sum();
}

// Its reciprocal; 1 where no row counts, so that their gradients of 0 stay 0 as torch's do.
Tensor mean_factor(const Tensor& target, const Tensor& weight, const Attributes& a,
                   at::TensorOptions options) {
  const Tensor divisor = divisor_of(target, weight, a, options);
  return at::where(live_rows(target, a.ignore_index).any(), divisor.reciprocal(),
                   at::ones({}, options));
}

int64_t class_dim(const Tensor& grad) { return grad.dim() == 1 ? 0 : 1; }

// 1 / number of rows, as the mean over distributions has it.
double per_row(const Tensor& target) {
  return static_cast<double>(target.size(class_dim(target))) / target.numel();
}

// What the saved gradient has still to be multiplied with; undefined for 1.
Tensor scale_of_saved(const Tensor& grad, const Tensor& target, const Tensor& weight,
                      const Attributes& a) {
  if (a.reduction != at::Reduction::Mean || grad.scalar_type() != at::kHalf) return Tensor();
  const auto options = grad.options().dtype(at::kFloat);
  if (a.mixed) return at::scalar_tensor(1 / static_cast<double>(target.numel()), options);
  if (is_distribution(target)) return at::scalar_tensor(per_row(target), options);
  return mean_factor(target, weight, a, options);
}

// saved gradient x upstream gradient of the loss
Tensor scaled(const Tensor& grad, const Tensor& dloss, const Tensor& scale, const Attributes& a) {
  const Tensor factor = scale.defined() ? dloss * scale : dloss;
  const Tensor shaped =
      a.reduction == at::Reduction::None ? factor.unsqueeze(class_dim(grad)) : factor;
  return at::mul(grad, shaped).to(grad.scalar_type());
}

// Whether rescaled() can multiply on the device by what the host has not seen.
bool on_device(const Tensor& grad, const Tensor& factor) {
  const auto dtype = factor.scalar_type(), own = grad.scalar_type();
  return factor.is_cuda() && factor.device() == grad.device() && factor.numel() == 1 &&
         (dtype == own || dtype == real_of(own)) && grad.is_non_overlapping_and_dense();
}

// A saved gradient that is given up: handed on as it is where the factor is 1, else multiplied where
// it lies. On CUDA the kernel finds out which: the host waits for nothing.
Tensor rescaled(const Tensor& grad, const Tensor& factor) {
  Tensor dx = grad.detach();
  if (!on_device(grad, factor)) {
    if (!factor.is_cpu() || factor.item<double>() != 1.0) dx.mul_(factor);
    return dx;
  }
  if (dx.numel() == 0) return dx;
  const c10::DeviceGuard guard(dx.device());
  RescaleArgs a{};
  a.dtype = dx.scalar_type();
  a.n = dx.numel();
  a.grad = dx.mutable_data_ptr();
  a.factor = factor.const_data_ptr();
  a.factor_is_real = factor.scalar_type() != a.dtype || factor.scalar_type() == real_of(a.dtype);
  a.stream = stream_of(dx);
  check("cross_entropy", tables(dx.device().type()).cross_entropy.data[0].rescale(a));
  dx.unsafeGetTensorImpl()->bump_version();
  return dx;
}

// The weights of the classes, or 1, in the shape that multiplies logits.
Tensor class_weights(const Tensor& grad, const Tensor& weight, at::TensorOptions options) {
  std::vector<int64_t> shape(grad.dim(), 1);
  shape[class_dim(grad)] = grad.size(class_dim(grad));
  return (weight.defined() ? weight.to(options.dtype())
                           : at::ones({grad.size(class_dim(grad))}, options))
      .reshape(shape);
}

// What each row's distribution is multiplied with in G, the saved gradient: per row or 0-d, or
// undefined for 1 and where two targets have factors of their own.
Tensor scale_in_saved(const Tensor& grad, const Tensor& target, const Tensor& weight,
                      const Attributes& a, at::TensorOptions options) {
  if (a.mixed || a.reduction != at::Reduction::Mean || grad.scalar_type() == at::kHalf)
    return Tensor();
  if (is_distribution(target)) return at::scalar_tensor(per_row(target), options);
  return mean_factor(target, weight, a, options);
}

// What the rows of the gradient G are made of. With q the target distribution times the row's scale
// s, G = p S - q where S = sum(q) + 2 z_loss s lse; p is taken of the logits where they were kept,
// else it is (G + q) / S.
struct RowTerms {
  Tensor p, S, steepness;  // steepness: 2 z_loss s, undefined without a z_loss
  int64_t dim;
  c10::ScalarType dtype;

  RowTerms(const Tensor& grad, const Tensor& target, const Tensor& weight, const Attributes& a,
           const Tensor& logits = {}, const Tensor& lse = {}, const Tensor& second_target = {});

  // d lse / dx, applied to v from the right, and from the left
  Tensor jvp_of_lse(const Tensor& v) const { return (p * v.to(p.scalar_type())).sum(dim); }
  Tensor vjp_of_lse(const Tensor& v) const { return (p * v.unsqueeze(dim)).to(dtype); }
  // d G / dx v = S p (v - sum(p v)) + 2 z_loss s p sum(p v), which is symmetric
  Tensor of_gradient(const Tensor& v) const {
    const Tensor u = v.to(p.scalar_type()), pu = (p * u).sum(dim, true);
    Tensor h = S * p * (u - pu);
    if (steepness.defined()) h = h + steepness * p * pu;
    return h.to(dtype);
  }
};

RowTerms::RowTerms(const Tensor& grad, const Tensor& target, const Tensor& weight,
                   const Attributes& a, const Tensor& logits, const Tensor& lse,
                   const Tensor& second_target)
    : dim(class_dim(grad)), dtype(grad.scalar_type()) {
  const int64_t n = grad.size(dim);
  const auto options = grad.options().dtype(real_of(grad.scalar_type()));
  const Tensor w = class_weights(grad, weight, options);
  Tensor q, live;
  const auto of_classes = [&](const Tensor& t) {
    const Tensor classes = at::arange(n, t.options().dtype(at::kLong)).reshape(w.sizes());
    live = live_rows(t, a.ignore_index).unsqueeze(dim).to(options.dtype());
    const Tensor one_hot = classes.eq(t.unsqueeze(dim)).to(options.dtype());
    return (one_hot * w * (1 - a.label_smoothing) +
            w * (a.label_smoothing / static_cast<double>(n))) *
           live;
  };
  if (a.mixed) {
    // Each with a divisor of its own; in float16 times the number of rows, see scale_of_saved().
    const double rows = grad.scalar_type() == at::kHalf ? static_cast<double>(target.numel()) : 1.0;
    const auto part = [&](const Tensor& t, double lam) {
      const Tensor q = of_classes(t) * lam;
      return a.reduction == at::Reduction::Mean ? q * (mean_factor(t, weight, a, options) * rows)
                                                : q;
    };
    q = part(target, a.lam) + part(second_target, 1 - a.lam);
  } else if (is_distribution(target)) {
    q = (target.to(options.dtype()) * (1 - a.label_smoothing) +
         a.label_smoothing / static_cast<double>(n)) *
        w;
  } else {
    q = of_classes(target);
  }
  const Tensor scale = scale_in_saved(grad, target, weight, a, options);
  if (scale.defined()) q = q * scale;
  S = q.sum(dim, true);
  if (a.z_loss != 0) {
    steepness = scale.defined() ? scale * (2 * a.z_loss) : at::scalar_tensor(2 * a.z_loss, options);
    S = S + steepness * lse.unsqueeze(dim);  // lse is 0 where a row is ignored
  }
  if (logits.defined()) {
    static const auto softmax = find_op<Tensor(const Tensor&, int64_t)>("softmax");
    p = softmax.call(logits.to(options.dtype()), dim);
    if (live.defined()) p = p * live;
  } else {
    const Tensor some = S.ne(0);
    p = at::where(some, (grad.to(options.dtype()) + q) / at::where(some, S, 1), 0);
  }
}

// Of a loss against distributions q, the derivatives to q: with k = (1 - label_smoothing) w, those
// of the loss are -k log p, and those of G are s k[j] (p[i] - [i == j]).
struct ToTarget {
  Tensor k, log_p, scale;  // scale: s, undefined for 1
  int64_t dim;

  ToTarget(const Tensor& logits, const Tensor& target, const Tensor& weight, const Attributes& a)
      : dim(class_dim(logits)) {
    static const auto log_softmax = find_op<Tensor(const Tensor&, int64_t)>("log_softmax");
    const auto options = logits.options().dtype(real_of(logits.scalar_type()));
    k = class_weights(logits, weight, options) * (1 - a.label_smoothing);
    log_p = log_softmax.call(logits.to(options.dtype()), dim);
    scale = scale_in_saved(logits, target, weight, a, options);
  }
  Tensor scaled(const Tensor& t) const { return scale.defined() ? t * scale : t; }
  Tensor of_loss(const Tensor& t) const {
    return -(k * t * log_p);
  }  // in torch's order: the first product stays in range
  Tensor vjp_of_gradient(const Tensor& u) const {
    return scaled(k * ((log_p.exp() * u).sum(dim, true) - u));
  }
  Tensor jvp_of_gradient(const Tensor& t) const {
    return scaled(log_p.exp() * (k * t).sum(dim, true) - k * t);
  }
};

Attributes attributes_of(const std::vector<c10::IValue>& v) {
  return {v[0].toInt(),
          v[1].toInt(),
          v[2].toDouble(),
          v[3].toBool(),
          v.size() > 4 ? v[4].toDouble() : 0.0,
          v.size() > 5,
          v.size() > 5 ? v[5].toDouble() : 1.0};
}

// Of outputs loss, G and, with the extras, lse; saved are G, target, weight, logits (where they are
// needed), lse and the second target.
variable_list cross_entropy_vjp(const variable_list& grads, const BackwardContext& c) {
  const Attributes a = attributes_of(c.attributes);
  const Tensor &grad = c.saved[0], &target = c.saved[1], &weight = c.saved[2], &dloss = grads[0];
  variable_list result(3);
  if (c.needed.size() > 2 && c.needed[2])
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "cross_entropy: the gradient to weight is not implemented; detach it");
  if (c.needed.size() > 1 && c.needed[1]) {
    const ToTarget to(c.saved[3], target, weight, a);
    Tensor dq;
    if (dloss.defined()) {
      Tensor factor = dloss.to(to.log_p.scalar_type());
      if (a.reduction == at::Reduction::None) factor = factor.unsqueeze(to.dim);
      if (a.reduction == at::Reduction::Mean) factor = factor * per_row(target);
      dq = to.of_loss(factor);
    }
    if (grads.size() > 1 && grads[1].defined()) {
      const Tensor h = to.vjp_of_gradient(grads[1].to(to.log_p.scalar_type()));
      dq = dq.defined() ? at::add(dq, h) : h;
    }
    if (dq.defined()) result[1] = dq.to(target.scalar_type());
  }
  if (!c.needed[0]) return result;
  Tensor dx;
  if (dloss.defined()) {
    const Tensor scale = scale_of_saved(grad, target, weight, a);
    const bool plain = c.last_use && a.exclusive && are_plain(dloss, grad);
    const Tensor factor = scale.defined() && dloss.is_cuda() ? dloss * scale : dloss;
    if (plain && a.reduction != at::Reduction::None &&
        (dloss.is_cpu() ? !scale.defined() : on_device(grad, factor))) {
      dx = rescaled(grad, factor);
    } else {
      dx = scaled(grad, dloss, scale, a);
    }
  }
  const bool of_grad = grads.size() > 1 && grads[1].defined(),
             of_lse = grads.size() > 2 && grads[2].defined();
  if (of_grad || of_lse) {
    const bool extended = c.saved.size() > 4;
    const RowTerms rows(grad, target, weight, a, extended ? c.saved[3] : Tensor(),
                        extended ? c.saved[4] : Tensor(), a.mixed ? c.saved[5] : Tensor());
    for (const Tensor& h : {of_grad ? rows.of_gradient(grads[1]) : Tensor(),
                            of_lse ? rows.vjp_of_lse(grads[2]) : Tensor()})
      if (h.defined()) dx = dx.defined() ? at::add(dx, h) : h;
  }
  result[0] = dx;
  return result;
}

// Whether what is saved goes through torch.autograd.graph.saved_tensors_hooks, which may keep it.
bool hooks_see_saved_tensors() {
  return at::SavedTensorDefaultHooks::is_enabled() &&
         at::SavedTensorDefaultHooks::get_hooks().has_value();
}

// With what the extras ask for; cross_entropy_lse where that is log(sum(exp)) or a z_loss.
Computed forward_and_record(DispatchKeySet ks, const Tensor& input, const Tensor& target,
                            const std::optional<Tensor>& weight, int64_t reduction,
                            int64_t ignore_index, double label_smoothing, bool upcast,
                            bool exclusive, const Extras& extras, bool with_lse) {
  Tensor loss, grad, lse;
  const Tensor& second = extras.second_target;
  const bool is_mixed = second.defined();
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (with_lse) {
      std::tie(loss, lse, grad) = lse_op().redispatch(
          ks & c10::after_autograd_keyset, input, target, weight, reduction, ignore_index,
          label_smoothing, upcast, extras.z_loss, extras.lse, /*with_grad=*/true);
    } else {
      std::tie(loss, grad) = forward_op().redispatch(
          ks & c10::after_autograd_keyset, input, target, weight, reduction, ignore_index,
          label_smoothing, upcast, is_mixed ? std::optional(second) : std::nullopt, extras.lam);
    }
  }
  const Tensor w = weight.value_or(Tensor());
  const Attributes a{reduction,     ignore_index, label_smoothing, exclusive,
                     extras.z_loss, is_mixed,     extras.lam};
  const bool keep_logits = extras.lse;  // for the gradient of lse, which is asked for
  Tensor dloss, dgrad, dlse;
  if (is_dual(input)) {
    const Tensor t = tangent(input), pt = primal(target), pw = w.defined() ? primal(w) : w;
    const Tensor scale = scale_of_saved(grad, pt, pw, a);
    const Tensor real = at::mul(grad.to(real_of(grad.scalar_type())), t);
    Tensor total = reduction == at::Reduction::None ? real.sum(class_dim(grad)) : real.sum();
    if (scale.defined()) total = total * scale;
    dloss = total.to(loss.scalar_type());
    const RowTerms rows(grad, pt, pw, a, keep_logits ? primal(input) : Tensor(), lse, second);
    dgrad = rows.of_gradient(t);
    if (with_lse) dlse = rows.jvp_of_lse(t);
  }
  if (is_dual(target)) {
    const ToTarget to(primal(input), primal(target), w.defined() ? primal(w) : w, a);
    const Tensor t = tangent(target).to(to.log_p.scalar_type());
    const Tensor rows = to.of_loss(t).sum(to.dim);
    const Tensor total = reduction == at::Reduction::None   ? rows
                         : reduction == at::Reduction::Mean ? rows.sum() * per_row(target)
                                                            : rows.sum();
    const Tensor part = total.to(loss.scalar_type()),
                 of_grad = to.jvp_of_gradient(t).to(grad.scalar_type());
    dloss = dloss.defined() ? at::add(dloss, part) : part;
    dgrad = dgrad.defined() ? at::add(dgrad, of_grad) : of_grad;
  }
  set_tangent(loss, dloss);
  set_tangent(grad, dgrad);
  if (with_lse) set_tangent(lse, dlse);
  if (requires_grad(input, target) || (w.defined() && requires_grad(w))) {
    const Tensor logits = keep_logits || requires_grad(target) ? input : Tensor();
    if (with_lse)
      record("fastops::cross_entropy_lse", &cross_entropy_vjp, {loss, grad, lse},
             {input, target, w}, {{grad, true}, {target}, {w}, {logits}, {lse, true}},
             {reduction, ignore_index, label_smoothing, exclusive, extras.z_loss});
    else if (is_mixed)
      record("fastops::cross_entropy", &cross_entropy_vjp, {loss, grad}, {input, target, w},
             {{grad, true}, {target}, {w}, {logits}, {Tensor()}, {second}},
             {reduction, ignore_index, label_smoothing, exclusive, extras.z_loss, extras.lam});
    else
      record("fastops::cross_entropy", &cross_entropy_vjp, {loss, grad}, {input, target, w},
             {{grad, true}, {target}, {w}, {logits}},
             {reduction, ignore_index, label_smoothing, exclusive});
  }
  return {loss, grad, lse};
}

std::tuple<Tensor, Tensor> forward_autograd(DispatchKeySet ks, const Tensor& input,
                                            const Tensor& target,
                                            const std::optional<Tensor>& weight, int64_t reduction,
                                            int64_t ignore_index, double label_smoothing,
                                            bool upcast, const std::optional<Tensor>& second_target,
                                            double lam) {
  Computed c =
      forward_and_record(ks, input, target, weight, reduction, ignore_index, label_smoothing,
                         upcast, false, mixed(second_target, lam), /*with_lse=*/false);
  return {c.loss, c.grad};
}

Tensor whole_autograd(DispatchKeySet ks, const Tensor& input, const Tensor& target,
                      const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
                      double label_smoothing, bool upcast,
                      const std::optional<Tensor>& second_target, double lam) {
  const Tensor w = weight.value_or(Tensor());
  if (requires_grad(input, target) || is_dual(input) || is_dual(target) ||
      (w.defined() && requires_grad(w)))
    return forward_and_record(ks, input, target, weight, reduction, ignore_index, label_smoothing,
                              upcast,
                              /*exclusive=*/!hooks_see_saved_tensors(), mixed(second_target, lam),
                              /*with_lse=*/false)
        .loss;
  at::AutoDispatchBelowADInplaceOrView guard;
  return whole_op().redispatch(ks & c10::after_autograd_keyset, input, target, weight, reduction,
                               ignore_index, label_smoothing, upcast, second_target, lam);
}

std::tuple<Tensor, Tensor, Tensor> lse_autograd(DispatchKeySet ks, const Tensor& input,
                                                const Tensor& target,
                                                const std::optional<Tensor>& weight,
                                                int64_t reduction, int64_t ignore_index,
                                                double label_smoothing, bool upcast, double z_loss,
                                                bool return_lse, bool with_grad) {
  const Tensor w = weight.value_or(Tensor());
  if (requires_grad(input, target) || is_dual(input) || is_dual(target) ||
      (w.defined() && requires_grad(w))) {
    const Extras extras{.lse = return_lse, .z_loss = z_loss};
    Computed c = forward_and_record(
        ks, input, target, weight, reduction, ignore_index, label_smoothing, upcast,
        /*exclusive=*/!with_grad && !hooks_see_saved_tensors(), extras, /*with_lse=*/true);
    return {c.loss, c.lse, with_grad ? c.grad : at::empty({0}, input.options())};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return lse_op().redispatch(ks & c10::after_autograd_keyset, input, target, weight, reduction,
                             ignore_index, label_smoothing, upcast, z_loss, return_lse, with_grad);
}

// The gradient that lies in the logits' memory, times what flows in.
variable_list overwriting_vjp(const variable_list& grads, const BackwardContext& c) {
  TORCH_CHECK(!at::GradMode::is_enabled(),
              "cross_entropy: inplace_backward=True leaves no logits to differentiate the gradient "
              "by; for create_graph=True "
              "leave it off");
  TORCH_CHECK(!grads[1].defined(),
              "cross_entropy: inplace_backward=True leaves no logits to differentiate lse by; "
              "leave it off, or detach lse");
  variable_list result(3);
  const Tensor& dloss = grads[0];
  if (!c.needed[0] || !dloss.defined()) return result;
  const Attributes a = attributes_of(c.attributes);
  const Tensor &grad = c.saved[0], scale = scale_of_saved(grad, c.saved[1], c.saved[2], a);
  if (!c.last_use) {
    result[0] = scaled(grad, dloss, scale, a);
    return result;
  }
  const Tensor factor = scale.defined() ? dloss * scale : dloss;
  if (a.reduction == at::Reduction::None) {
    result[0] = grad.detach().mul_(factor.unsqueeze(class_dim(grad)));
  } else {
    result[0] = rescaled(grad, factor);
  }
  return result;
}

std::tuple<Tensor, Tensor> overwriting_autograd(
    DispatchKeySet ks, Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool upcast, double z_loss) {
  const Tensor w = weight.value_or(Tensor());
  const bool wanted = requires_grad(input);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !is_dual(input) && !is_dual(target),
      "cross_entropy: forward-mode derivatives need inplace_backward=False");
  TORCH_CHECK_NOT_IMPLEMENTED(
      !requires_grad(target),
      "cross_entropy: the gradient to target needs the logits: leave inplace_backward off");
  TORCH_CHECK_NOT_IMPLEMENTED(
      !w.defined() || !requires_grad(w),
      "cross_entropy: the gradient to weight is not implemented; detach it");
  check_inplace(input, wanted);
  auto edges = wanted ? edges_of({input, target, w}) : torch::autograd::edge_list();
  std::tuple<Tensor, Tensor> result;
  {
    at::AutoDispatchBelowAutograd guard;
    result = overwriting_op().redispatch(ks & c10::after_autograd_keyset, input, target, weight,
                                         reduction, ignore_index, label_smoothing, upcast, z_loss);
  }
  if (wanted)
    record_overwriting("fastops::cross_entropy_", &overwriting_vjp,
                       {std::get<0>(result), std::get<1>(result)}, std::move(edges),
                       {{input.detach()}, {target}, {w}},
                       {reduction, ignore_index, label_smoothing, true, z_loss}, input,
                       "cross_entropy: with inplace_backward=True these logits hold their "
                       "gradient; they cannot be "
                       "used for anything else that is differentiated");
  return result;
}

std::tuple<Tensor, Tensor> overwriting_version(DispatchKeySet ks, Tensor& input,
                                               const Tensor& target,
                                               const std::optional<Tensor>& weight,
                                               int64_t reduction, int64_t ignore_index,
                                               double label_smoothing, bool upcast, double z_loss) {
  std::tuple<Tensor, Tensor> result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result =
        overwriting_op().redispatch(ks & c10::after_ADInplaceOrView_keyset, input, target, weight,
                                    reduction, ignore_index, label_smoothing, upcast, z_loss);
  }
  torch::autograd::impl::bump_version(input);
  return result;
}

// Under autocast the loss is float32; the logits are read as they are.
template <DispatchKey key>
Tensor whole_autocast(const Tensor& input, const Tensor& target,
                      const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
                      double label_smoothing, bool, const std::optional<Tensor>& second_target,
                      double lam) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  if (is_distribution(target) && target.scalar_type() != input.scalar_type())
    return whole_op().call(input.to(at::kFloat), target.to(at::kFloat), weight, reduction,
                           ignore_index, label_smoothing, true, second_target, lam);
  return whole_op().call(input, target, weight, reduction, ignore_index, label_smoothing, true,
                         second_target, lam);
}

template <DispatchKey key>
std::tuple<Tensor, Tensor, Tensor> lse_autocast(const Tensor& input, const Tensor& target,
                                                const std::optional<Tensor>& weight,
                                                int64_t reduction, int64_t ignore_index,
                                                double label_smoothing, bool, double z_loss,
                                                bool return_lse, bool with_grad) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  return lse_op().call(input, target, weight, reduction, ignore_index, label_smoothing, true,
                       z_loss, return_lse, with_grad);
}
template <DispatchKey key>
std::tuple<Tensor, Tensor> overwriting_autocast(Tensor& input, const Tensor& target,
                                                const std::optional<Tensor>& weight,
                                                int64_t reduction, int64_t ignore_index,
                                                double label_smoothing, bool, double z_loss) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  return overwriting_op().call(input, target, weight, reduction, ignore_index, label_smoothing,
                               true, z_loss);
}

TORCH_LIBRARY_FRAGMENT(fastops, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  size_t i = 0;
  for (const SoftmaxKernel& r : softmax_table(c10::DeviceType::CPU)) {
    const std::string n = r.name, b = n + "_backward";
    m.def((n + "(Tensor input, int dim) -> Tensor").c_str(), tags);
    m.def((b + "(Tensor grad, Tensor output, int dim) -> Tensor").c_str(), tags);
    for (const auto key : {DispatchKey::CPU, DispatchKey::CUDA}) {
      if (key == DispatchKey::CUDA && !cuda_built()) continue;
      m.impl(n.c_str(), torch::dispatch(key, torch::CppFunction(SoftmaxForward{i})));
      m.impl(b.c_str(), torch::dispatch(key, torch::CppFunction(SoftmaxBackward{i})));
    }
    m.impl(n.c_str(),
           torch::dispatch(DispatchKey::Autograd, torch::CppFunction(SoftmaxForwardAutograd{i})));
    m.impl(b.c_str(),
           torch::dispatch(DispatchKey::Autograd, torch::CppFunction(SoftmaxBackwardAutograd{i})));
    for (const auto key : kAutocastKeys)
      if (has_autocast_rule(key, n, "int"))
        m.impl(n.c_str(), torch::dispatch(key, torch::CppFunction(SoftmaxAutocast{i, key})));
    ++i;
  }
  const std::string arguments =
      " input, Tensor target, Tensor? weight=None, int reduction=1, int ignore_index=-100, "
      "float label_smoothing=0.0, bool upcast=False";
  const std::string mixup = ", Tensor? second_target=None, float lam=1.0";
  m.def(("cross_entropy(Tensor" + arguments + mixup + ") -> Tensor").c_str(), tags);
  m.def(("cross_entropy_forward(Tensor" + arguments + mixup + ") -> (Tensor, Tensor)").c_str(),
        tags);
  // (loss, log(sum(exp)) of each row, gradient), the last of one dimension without elements unless
  // with_grad
  m.def(("cross_entropy_lse(Tensor" + arguments +
         ", float z_loss=0.0, bool return_lse=True, bool with_grad=False) -> (Tensor, Tensor, "
         "Tensor)")
            .c_str(),
        tags);
  m.def(
      ("cross_entropy_(Tensor(a!)" + arguments + ", float z_loss=0.0) -> (Tensor, Tensor)").c_str(),
      tags);
  for (const auto key : {DispatchKey::CPU, DispatchKey::CUDA}) {
    if (key == DispatchKey::CUDA && !cuda_built()) continue;
    m.impl("cross_entropy", torch::dispatch(key, &cross_entropy));
    m.impl("cross_entropy_forward", torch::dispatch(key, &cross_entropy_forward));
    m.impl("cross_entropy_lse", torch::dispatch(key, &cross_entropy_lse));
    m.impl("cross_entropy_", torch::dispatch(key, &cross_entropy_overwriting));
  }
  m.impl("cross_entropy", torch::dispatch(DispatchKey::Autograd, &whole_autograd));
  m.impl("cross_entropy_forward", torch::dispatch(DispatchKey::Autograd, &forward_autograd));
  m.impl("cross_entropy_lse", torch::dispatch(DispatchKey::Autograd, &lse_autograd));
  m.impl("cross_entropy_", torch::dispatch(DispatchKey::Autograd, &overwriting_autograd));
  m.impl("cross_entropy_", torch::dispatch(DispatchKey::ADInplaceOrView, &overwriting_version));
  m.impl("cross_entropy_lse",
         torch::dispatch(DispatchKey::AutocastCPU, &lse_autocast<DispatchKey::AutocastCPU>));
  m.impl("cross_entropy_lse",
         torch::dispatch(DispatchKey::AutocastCUDA, &lse_autocast<DispatchKey::AutocastCUDA>));
  m.impl("cross_entropy_", torch::dispatch(DispatchKey::AutocastCPU,
                                           &overwriting_autocast<DispatchKey::AutocastCPU>));
  m.impl("cross_entropy_", torch::dispatch(DispatchKey::AutocastCUDA,
                                           &overwriting_autocast<DispatchKey::AutocastCUDA>));
  m.impl("cross_entropy",
         torch::dispatch(DispatchKey::AutocastCPU, &whole_autocast<DispatchKey::AutocastCPU>));
  m.impl("cross_entropy",
         torch::dispatch(DispatchKey::AutocastCUDA, &whole_autocast<DispatchKey::AutocastCUDA>));
}

}  // namespace

void bind_rows(pybind11::module_& m) {
  size_t i = 0;
  for (const SoftmaxKernel& r : softmax_table(c10::DeviceType::CPU)) {
    def(m, r.name,
        [i](const Tensor& input, int64_t dim) { return softmax_ops(i).forward.call(input, dim); });
    ++i;
  }
  def(m, "cross_entropy",
      [](const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
         int64_t reduction, int64_t ignore_index, double label_smoothing) {
        return whole_op().call(input, target, weight, reduction, ignore_index, label_smoothing,
                               false, {}, 1);
      });
  // torch has none of these: what has no kernel is not handed on.
  m.def("cross_entropy_mixup",
        [](const Tensor& input, const Tensor& target, const Tensor& second_target, double lam,
           const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
           double label_smoothing) {
          const Unlocked unlocked(input);
          return whole_op().call(input, target, weight, reduction, ignore_index, label_smoothing,
                                 false, second_target, lam);
        });
  const auto with_lse = [](const Tensor& input, const Tensor& target,
                           const std::optional<Tensor>& weight, int64_t reduction,
                           int64_t ignore_index, double label_smoothing, double z_loss,
                           bool return_lse) {
    const Unlocked unlocked(input);
    auto [loss, lse, grad] = lse_op().call(input, target, weight, reduction, ignore_index,
                                           label_smoothing, false, z_loss, return_lse, false);
    return std::make_tuple(loss, lse);
  };
  m.def("cross_entropy_lse", with_lse);
  // Where there is no gradient to be written, or none in memory of this kind, the logits are left
  // alone.
  m.def("cross_entropy_",
        [with_lse](Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                   int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss,
                   bool return_lse) {
          if (!requires_grad(input) || is_dual(input) || at::isTensorSubclassLike(input))
            return with_lse(input, target, weight, reduction, ignore_index, label_smoothing, z_loss,
                            return_lse);
          const Unlocked unlocked(input);
          return overwriting_op().call(input, target, weight, reduction, ignore_index,
                                       label_smoothing, false, z_loss);
        });
}

}  // namespace fastops
