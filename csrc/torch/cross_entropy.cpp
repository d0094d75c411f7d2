// Cross-entropy as torch sees it: schemas, checks and derivatives. Three ops:
//
// cross_entropy gives the loss, and is what a caller without wishes of its own calls.
// cross_entropy_forward computes the loss and, in the same visit of the logits, its gradient, and
// gives both out; the backward pass then has next to nothing to do, and no more is saved than the
// gradient itself. Where a gradient of the gradient is asked for, the softmax is recovered from it
// (see RowTerms). On demand it gives each row's log(sum(exp)) as well. cross_entropy_ does the
// same, and leaves the gradient in the logits' own memory.
#include <ATen/MemoryOverlap.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
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

#include <cmath>

#include "bind.h"
#include "layout.h"
#include "reduction.h"
#include "register.h"

namespace fastops {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;

using MaybeTensor = std::optional<Tensor>;
// (input, target, weight, reduction, ignore_index, label_smoothing, upcast, second_target, lam)
using Whole = Tensor(const Tensor&, const Tensor&, const MaybeTensor&, int64_t, int64_t, double,
                     bool, const MaybeTensor&, double);
// (the same, z_loss, return_lse, with_grad) -> (loss, gradient, lse, factor). What is not there is
// of one dimension without elements: the gradient unless with_grad; lse, log(sum(exp)) of each row,
// unless return_lse or a z_loss; the factor where that is 1, see Computed.
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Forward = Results(const Tensor&, const Tensor&, const MaybeTensor&, int64_t, int64_t, double,
                        bool, const MaybeTensor&, double, double, bool, bool);
// (input, target, weight, reduction, ignore_index, label_smoothing, upcast, z_loss) -> (loss, lse,
// factor)
using Overwriting = std::tuple<Tensor, Tensor, Tensor>(Tensor&, const Tensor&, const MaybeTensor&,
                                                       int64_t, int64_t, double, bool, double);
constexpr size_t kUpcast = 6;

constinit struct Family {
  Op<Whole> whole;
  Op<Forward> forward;
  Op<Overwriting> overwriting;
  Op<Tensor(const Tensor&, int64_t)> softmax, log_softmax;
} ops;

// ------------------------------------------------------------------------------------------------
// kernels

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

// Whether the target is a float32 distribution beside narrower logits: the kernels for the CPU read
// both as they are, and the loss is float32, as torch promotes it.
bool is_wider(const Tensor& input, const Tensor& target) {
  return input.is_cpu() && target.scalar_type() == at::kFloat &&
         (input.scalar_type() == at::kBFloat16 || input.scalar_type() == at::kHalf);
}

void check_target(const Tensor& input, const Tensor& target, int64_t ignore_index) {
  if (input.dim() > 1 && target.dim() >= 1)
    TORCH_CHECK_VALUE(input.size(0) == target.size(0), "Expected input batch_size (", input.size(0),
                      ") to match target batch_size (", target.size(0), ").");
  if (is_distribution(target)) {
    TORCH_CHECK(target.sizes() == input.sizes(),
                "cross_entropy: expected class probabilities of size ", input.sizes(),
                " like the logits, got ", target.sizes(), "; class indices are int64");
    TORCH_CHECK(target.scalar_type() == input.scalar_type() || is_wider(input, target),
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
Problem problem(const Tensor& input, const Tensor& target, const MaybeTensor& weight,
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
                    ((autocast || is_wider(input, target)) && to_float(weight->scalar_type()) &&
                     to_float(input.scalar_type())),
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
  // What the gradient has still to be multiplied by: float16 cannot hold gradients that are divided
  // by a large batch. Undefined for 1.
  Tensor factor;
};

// What cross_entropy can do beside a loss.
struct Extras {
  bool lse = false;
  double z_loss = 0;
  bool overwrite = false;     // the gradient goes where the logits are
  Tensor second_target = {};  // of mixup; then lam is the part of the first
  double lam = 1;
};

// 1 / divisor, the sum of the weights of the rows that count; 1 where no row counts, so that their
// gradients of 0 stay 0 as torch's do.
Tensor reciprocal_of(const Tensor& divisor, const Tensor& target, int64_t ignore_index) {
  if (!divisor.is_cpu())
    return at::where(target.ne(ignore_index).any(), divisor.reciprocal(),
                     at::ones({}, divisor.options()));
  const float d = *divisor.const_data_ptr<float>();
  const bool none = d == 0 && !target.ne(ignore_index).any().item<bool>();
  return at::scalar_tensor(none ? 1.0f : 1.0f / d, divisor.options());
}

Computed compute(const Tensor& input, const Tensor& target, const MaybeTensor& weight,
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
  const bool wider = is_wider(p.x, target);
  const auto real = real_of(p.x.scalar_type()), dtype = upcast || wider ? real : p.x.scalar_type();
  const auto options = p.x.options().dtype(real);
  const c10::DeviceGuard guard(p.x.device());
  const auto& kernel = tables(p.x.device().type()).cross_entropy.data[0];

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
    a.probability_is_real = wider;
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
    check("cross_entropy", kernel.divisor(b, divisor.mutable_data_ptr(), &bad_row));
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
    const bool half = p.x.scalar_type() == at::kHalf;  // see Computed::factor
    if (mean && half)
      result.factor = divisor.defined() && !second.defined()
                          ? reciprocal_of(divisor, index, ignore_index)
                          : at::scalar_tensor(1 / static_cast<double>(losses.numel()), options);
    if (mean && second.defined()) {
      if (half) a.scale = static_cast<double>(losses.numel());
    } else if (mean && !half) {
      a.divisor = divisor.defined() ? divisor.const_data_ptr() : nullptr;
      a.scale = scale;
    }
  }
  check("cross_entropy", (distribution ? kernel.forward_probability : kernel.forward)(a));
  if (reduction == at::Reduction::None) {
    result.loss = as_dtype(losses.as_strided(p.result_sizes, strides).contiguous(), dtype);
  } else {
    result.loss =
        as_dtype(sum_of(losses, scale, mean && !second.defined() ? divisor : Tensor()), dtype);
  }
  if (extras.lse) result.lse = lse.as_strided(p.result_sizes, strides).contiguous();
  return result;
}

// t, or what stands for it where it is not there.
Tensor or_none(const Tensor& t, const Tensor& beside, at::ScalarType dtype) {
  return t.defined() ? t : output_beside(beside, {0}, dtype);
}

Results cross_entropy_forward(const Tensor& input, const Tensor& target, const MaybeTensor& weight,
                              int64_t reduction, int64_t ignore_index, double label_smoothing,
                              bool upcast, const MaybeTensor& second_target, double lam,
                              double z_loss, bool return_lse, bool with_grad) {
  const Computed c =
      compute(input, target, weight, reduction, ignore_index, label_smoothing, upcast, with_grad,
              {.lse = return_lse || z_loss != 0,
               .z_loss = z_loss,
               .second_target = second_target.value_or(Tensor()),
               .lam = lam});
  const auto dtype = input.scalar_type();
  return {c.loss, or_none(c.grad, input, dtype), or_none(c.lse, input, real_of(dtype)),
          or_none(c.factor, input, real_of(dtype))};
}

Tensor cross_entropy(const Tensor& input, const Tensor& target, const MaybeTensor& weight,
                     int64_t reduction, int64_t ignore_index, double label_smoothing, bool upcast,
                     const MaybeTensor& second_target, double lam) {
  return compute(input, target, weight, reduction, ignore_index, label_smoothing, upcast, false,
                 {.second_target = second_target.value_or(Tensor()), .lam = lam})
      .loss;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_overwriting(
    Tensor& input, const Tensor& target, const MaybeTensor& weight, int64_t reduction,
    int64_t ignore_index, double label_smoothing, bool upcast, double z_loss) {
  const Computed c = compute(input, target, weight, reduction, ignore_index, label_smoothing,
                             upcast, true, {.lse = true, .z_loss = z_loss, .overwrite = true});
  return {c.loss, c.lse, or_none(c.factor, input, real_of(input.scalar_type()))};
}

// ------------------------------------------------------------------------------------------------
// derivatives, in torch ops but for the common case. `grad` is the second output of
// cross_entropy_forward.

// What is saved, undefined where it is not needed, and the values beside it.
enum { kGrad, kTarget, kWeight, kLogits, kLse, kSecondTarget, kFactor };
struct Attributes {
  int64_t reduction, ignore_index;
  double label_smoothing;
  bool exclusive;  // nobody else can see the saved gradient: it may be handed on or overwritten
  double z_loss;
  bool mixed;  // of two targets, of which lam is the part of the first
  double lam;

  void save(Saved& s) const {
    s.value(reduction, ignore_index, label_smoothing, exclusive, z_loss, mixed, lam);
  }
  static Attributes of(const BackwardContext& c) {
    return {c.values[0].toInt(),   c.values[1].toInt(),    c.values[2].toDouble(),
            c.values[3].toBool(),  c.values[4].toDouble(), c.values[5].toBool(),
            c.values[6].toDouble()};
  }
};
// The inputs to which gradients flow, and the outputs from which.
enum { kInput, kTargetInput, kWeightInput };
enum { kLoss, kGradOutput, kLseOutput };
Tensor output(const variable_list& grads, size_t k) {
  return k < grads.size() ? grads[k] : Tensor();
}

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

// A saved gradient that is given up: handed on as it is where the factor is 1, else multiplied
// where it lies. On CUDA the kernel finds out which: the host waits for nothing.
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
    // Each with a divisor of its own; in float16 times the number of rows, see Computed::factor.
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
    p = ops.softmax.call(logits.to(options.dtype()), dim);
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
    const auto options = logits.options().dtype(real_of(logits.scalar_type()));
    k = class_weights(logits, weight, options) * (1 - a.label_smoothing);
    log_p = ops.log_softmax.call(logits.to(options.dtype()), dim);
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

variable_list vjp(const variable_list& grads, const BackwardContext& c) {
  const Attributes a = Attributes::of(c);
  const Tensor &grad = c.saved[kGrad], &target = c.saved[kTarget], &weight = c.saved[kWeight];
  const Tensor dloss = output(grads, kLoss), dgrad = output(grads, kGradOutput),
               dlse = output(grads, kLseOutput);
  variable_list result(3);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !c.wants(kWeightInput),
      "cross_entropy: the gradient to weight is not implemented; detach it");
  if (c.wants(kTargetInput)) {
    const ToTarget to(c.saved[kLogits], target, weight, a);
    Tensor dq;
    if (dloss.defined()) {
      Tensor factor = dloss.to(to.log_p.scalar_type());
      if (a.reduction == at::Reduction::None) factor = factor.unsqueeze(to.dim);
      if (a.reduction == at::Reduction::Mean) factor = factor * per_row(target);
      dq = to.of_loss(factor);
    }
    if (dgrad.defined())
      dq = sum_of_defined(dq, to.vjp_of_gradient(dgrad.to(to.log_p.scalar_type())));
    if (dq.defined()) result[kTargetInput] = dq.to(target.scalar_type());
  }
  if (!c.wants(kInput)) return result;
  Tensor dx;
  if (dloss.defined()) {
    const Tensor& factor = c.saved[kFactor];
    const bool plain = c.last_use && a.exclusive && are_plain(dloss, grad);
    const Tensor by = factor.defined() && dloss.is_cuda() ? at::mul(dloss, factor) : dloss;
    if (plain && a.reduction != at::Reduction::None &&
        (dloss.is_cpu() ? !factor.defined() : on_device(grad, by))) {
      dx = rescaled(grad, by);
    } else {
      dx = scaled(grad, dloss, factor, a);
    }
  }
  if (dgrad.defined() || dlse.defined()) {
    const RowTerms rows(grad, target, weight, a, c.saved[kLogits], c.saved[kLse],
                        c.saved[kSecondTarget]);
    if (dgrad.defined()) dx = sum_of_defined(dx, rows.of_gradient(dgrad));
    if (dlse.defined()) dx = sum_of_defined(dx, rows.vjp_of_lse(dlse));
  }
  result[kInput] = dx;
  return result;
}

// Whether what is saved goes through torch.autograd.graph.saved_tensors_hooks, which may keep it.
bool hooks_see_saved_tensors() {
  return at::SavedTensorDefaultHooks::is_enabled() &&
         at::SavedTensorDefaultHooks::get_hooks().has_value();
}

// Whether derivatives of the call are asked for.
bool differentiated(const Tensor& input, const Tensor& target, const MaybeTensor& weight) {
  return requires_grad(input, target) || is_dual(input) || is_dual(target) ||
         (weight && requires_grad(*weight));
}

// The tangents of loss, gradient and lse.
std::array<Tensor, 3> jvp(const Results& results, const DualTensor& x, const DualTensor& target,
                          const Tensor& weight, const Attributes& a, bool keep_logits,
                          const Tensor& factor, const Tensor& second) {
  const auto& [loss, grad, lse, _] = results;
  Tensor dloss, dgrad, dlse;
  if (x.moves()) {
    const Tensor product = at::mul(grad.to(real_of(grad.scalar_type())), x.tangent);
    Tensor total =
        a.reduction == at::Reduction::None ? product.sum(class_dim(grad)) : product.sum();
    if (factor.defined()) total = total * factor;
    dloss = total.to(loss.scalar_type());
    const RowTerms rows(grad, target.value, weight, a, keep_logits ? x.value : Tensor(), lse,
                        second);
    dgrad = rows.of_gradient(x.tangent);
    dlse = rows.jvp_of_lse(x.tangent);
  }
  if (target.moves()) {
    const ToTarget to(x.value, target.value, weight, a);
    const Tensor t = target.tangent.to(to.log_p.scalar_type());
    const Tensor rows = to.of_loss(t).sum(to.dim);
    const Tensor total = a.reduction == at::Reduction::None   ? rows
                         : a.reduction == at::Reduction::Mean ? rows.sum() * per_row(target.value)
                                                              : rows.sum();
    dloss = sum_of_defined(dloss, total.to(loss.scalar_type()));
    dgrad = sum_of_defined(dgrad, to.jvp_of_gradient(t).to(grad.scalar_type()));
  }
  return {dloss, dgrad, dlse};
}

Results forward_autograd(DispatchKeySet ks, const Tensor& input, const Tensor& target,
                         const MaybeTensor& weight, int64_t reduction, int64_t ignore_index,
                         double label_smoothing, bool upcast, const MaybeTensor& second_target,
                         double lam, double z_loss, bool return_lse, bool with_grad) {
  const bool wanted = differentiated(input, target, weight);
  Results results = ops.forward.below_autograd(ks, input, target, weight, reduction, ignore_index,
                                               label_smoothing, upcast, second_target, lam, z_loss,
                                               return_lse, with_grad || wanted);
  if (!wanted) return results;
  auto& [loss, grad, lse, factor] = results;
  const Tensor w = weight.value_or(Tensor()), second = second_target.value_or(Tensor()),
               factor_or_none = factor.sym_numel() != 0 ? factor : Tensor();
  const bool has_lse = return_lse || z_loss != 0;
  const Attributes a{reduction,
                     ignore_index,
                     label_smoothing,
                     /*exclusive=*/!with_grad && !hooks_see_saved_tensors(),
                     z_loss,
                     second.defined(),
                     lam};
  if (is_dual(input) || is_dual(target)) {
    const auto [dloss, dgrad, dlse] =
        jvp(results, call_args::dual(input), call_args::dual(target), w.defined() ? primal(w) : w,
            a, return_lse, factor_or_none, second);
    set_tangent(loss, dloss);
    set_tangent(grad, dgrad);
    if (has_lse) set_tangent(lse, dlse);
  }
  if (requires_grad(input, target) || requires_grad(w)) {
    Saved saved;
    saved.output(grad);
    saved.input(target);
    saved.input(w);
    // The gradients of lse and to the target are made of the logits.
    saved.input(return_lse || requires_grad(target) ? input : Tensor());
    has_lse ? saved.output(lse) : saved.input(Tensor());
    saved.input(second);
    saved.input(factor_or_none);
    a.save(saved);
    const std::array<const Tensor*, 3> outputs{&loss, &grad, &lse};
    record({has_lse ? ops.forward.name : ops.whole.name, &vjp, nullptr},
           at::ArrayRef<const Tensor*>(outputs).slice(0, has_lse ? 3 : 2),
           edges_of({&input, &target, &w}), saved);
  }
  if (!with_grad) grad = at::empty({0}, input.options());
  return results;
}

Tensor whole_autograd(DispatchKeySet ks, const Tensor& input, const Tensor& target,
                      const MaybeTensor& weight, int64_t reduction, int64_t ignore_index,
                      double label_smoothing, bool upcast, const MaybeTensor& second_target,
                      double lam) {
  if (differentiated(input, target, weight))
    return std::get<kLoss>(forward_autograd(
        ks, input, target, weight, reduction, ignore_index, label_smoothing, upcast, second_target,
        lam, /*z_loss=*/0, /*return_lse=*/false, /*with_grad=*/false));
  return ops.whole.below_autograd(ks, input, target, weight, reduction, ignore_index,
                                  label_smoothing, upcast, second_target, lam);
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
  if (!c.wants(kInput) || !dloss.defined()) return result;
  const Attributes a = Attributes::of(c);
  const Tensor &grad = c.saved[kGrad], &scale = c.saved[kFactor];
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

std::tuple<Tensor, Tensor, Tensor> overwriting_autograd(
    DispatchKeySet ks, Tensor& input, const Tensor& target, const MaybeTensor& weight,
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
      !requires_grad(w), "cross_entropy: the gradient to weight is not implemented; detach it");
  check_inplace(input, wanted);
  auto edges = wanted ? edges_of({&input, &target, &w}) : torch::autograd::edge_list();
  auto results = ops.overwriting.to_version_counter(ks, input, target, weight, reduction,
                                                    ignore_index, label_smoothing, upcast, z_loss);
  if (!wanted) return results;
  const auto& [loss, lse, factor] = results;
  Saved saved;
  saved.input(input.detach());
  for (const Tensor& t : {target, w, Tensor(), Tensor(), Tensor()}) saved.input(t);
  saved.input(factor.sym_numel() != 0 ? factor : Tensor());
  Attributes{reduction, ignore_index, label_smoothing, true, z_loss, false, 1}.save(saved);
  record_overwriting({ops.overwriting.name, &overwriting_vjp, nullptr}, {&loss, &lse},
                     std::move(edges), saved, input,
                     "cross_entropy: with inplace_backward=True these logits hold their gradient; "
                     "they cannot be used for anything else that is differentiated");
  return results;
}

// Under autocast the loss is float32; the logits are read as they are, unless there is a
// distribution beside them of a dtype that the kernels do not take there.
struct WholeAutocast {
  DispatchKey key;
  Tensor operator()(const Tensor& input, const Tensor& target, const MaybeTensor& weight,
                    int64_t reduction, int64_t ignore_index, double label_smoothing, bool,
                    const MaybeTensor& second_target, double lam) const {
    const c10::impl::ExcludeDispatchKeyGuard guard(key);
    const bool cast = is_distribution(target) && target.scalar_type() != input.scalar_type() &&
                      !is_wider(input, target);
    return ops.whole.call(cast ? input.to(at::kFloat) : input,
                          cast ? target.to(at::kFloat) : target, weight, reduction, ignore_index,
                          label_smoothing, /*upcast=*/true, second_target, lam);
  }
};

}  // namespace

void register_cross_entropy(torch::Library& m) {
  ops.softmax = Op<Tensor(const Tensor&, int64_t)>::of("softmax");
  ops.log_softmax = Op<Tensor(const Tensor&, int64_t)>::of("log_softmax");
  const std::string arguments =
      " input, Tensor target, Tensor? weight=None, int reduction=1, int ignore_index=-100, "
      "float label_smoothing=0.0, bool upcast=False";
  const std::string mixup = ", Tensor? second_target=None, float lam=1.0";
  Registration whole(m, ops.whole, "cross_entropy", "(Tensor" + arguments + mixup + ") -> Tensor");
  whole.kernel(&cross_entropy).on(DispatchKey::Autograd, &whole_autograd);
  for (const auto key : kAutocastKeys) whole.on(key, WholeAutocast{key});
  Registration(m, ops.forward, "cross_entropy_forward",
               "(Tensor" + arguments + mixup +
                   ", float z_loss=0.0, bool return_lse=False, bool with_grad=True) -> (Tensor, "
                   "Tensor, Tensor, Tensor)")
      .kernel(&cross_entropy_forward)
      .on(DispatchKey::Autograd, &forward_autograd)
      .autocast_upcasts<kUpcast>();
  Registration(m, ops.overwriting, "cross_entropy_",
               "(Tensor(a!)" + arguments + ", float z_loss=0.0) -> (Tensor, Tensor, Tensor)")
      .kernel(&cross_entropy_overwriting)
      .on(DispatchKey::Autograd, &overwriting_autograd)
      .counts_versions()
      .autocast_upcasts<kUpcast>();
}

void bind_cross_entropy(pybind11::module_& m) {
  def(m, "cross_entropy",
      [](const Tensor& input, const Tensor& target, const MaybeTensor& weight, int64_t reduction,
         int64_t ignore_index, double label_smoothing) {
        return ops.whole.call(input, target, weight, reduction, ignore_index, label_smoothing,
                              false, {}, 1);
      });
  // torch has none of these: what has no kernel is not handed on.
  m.def("cross_entropy_mixup",
        [](const Tensor& input, const Tensor& target, const Tensor& second_target, double lam,
           const MaybeTensor& weight, int64_t reduction, int64_t ignore_index,
           double label_smoothing) {
          const Unlocked unlocked(input);
          return ops.whole.call(input, target, weight, reduction, ignore_index, label_smoothing,
                                false, second_target, lam);
        });
  const auto with_lse = [](const Tensor& input, const Tensor& target, const MaybeTensor& weight,
                           int64_t reduction, int64_t ignore_index, double label_smoothing,
                           double z_loss, bool return_lse) {
    const Unlocked unlocked(input);
    auto [loss, grad, lse, factor] =
        ops.forward.call(input, target, weight, reduction, ignore_index, label_smoothing, false, {},
                         1, z_loss, return_lse, /*with_grad=*/false);
    return std::make_tuple(loss, lse);
  };
  m.def("cross_entropy_lse", with_lse);
  // Where there is no gradient to be written, or none in memory of this kind, the logits are left
  // alone.
  m.def("cross_entropy_", [with_lse](Tensor& input, const Tensor& target, const MaybeTensor& weight,
                                     int64_t reduction, int64_t ignore_index,
                                     double label_smoothing, double z_loss, bool return_lse) {
    if (!requires_grad(input) || is_dual(input) || at::isTensorSubclassLike(input))
      return with_lse(input, target, weight, reduction, ignore_index, label_smoothing, z_loss,
                      return_lse);
    const Unlocked unlocked(input);
    auto [loss, lse, factor] = ops.overwriting.call(input, target, weight, reduction, ignore_index,
                                                    label_smoothing, false, z_loss);
    return std::make_tuple(loss, lse);
  });
}

}  // namespace fastops
