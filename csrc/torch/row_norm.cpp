// Layer norm and RMS norm, alone or of a sum, as torch sees them: schemas, checks and derivatives.
// Gradients of gradients are made of torch's own ops, and whatever else the kernels do not take
// never comes here: fastops/functional/_row_norm.py hands it to torch.
#include <ATen/ops/add.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../kernels/row_norm.h"
#include "autograd.h"
#include "backend.h"
#include "bind.h"
#include "layout.h"
#include "register.h"

namespace fastops {
namespace {

using at::Tensor;
using c10::DispatchKeySet;
using MaybeTensor = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor>;

Tensor or_undefined(const MaybeTensor& t) { return t.value_or(Tensor()); }
MaybeTensor or_none(const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

struct Family {
  const char* name;
  bool centered;
  // (input, residual, weight, bias, dims, eps) -> (output, sum, statistics). The sum is empty
  // without a residual. The statistics are a row of means, where they are subtracted, and one of
  // 1 / sqrt(variance + eps).
  Op<Results(const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, int64_t,
             double)>
      forward;
  // (grad, grad_sum, what was normalized, weight, statistics, dims, which are wanted) -> (to the
  // input, to weight, to bias), empty where not wanted
  Op<Results(const Tensor&, const MaybeTensor&, const Tensor&, const MaybeTensor&, const Tensor&,
             int64_t, bool, bool, bool)>
      backward;
};

// ------------------------------------------------------------------------------------------------
// kernels

const RowNormKernel& kernel(const Family& f, const Tensor& x, int64_t dims) {
  check_dtype(f.name, x);
  TORCH_CHECK(dims >= 1 && dims <= x.dim(), f.name, ": expected 1 to ", x.dim(),
              " dimensions to normalize over, got ", dims);
  TORCH_CHECK_NOT_IMPLEMENTED(x.numel() > 0, f.name, ": an empty input is left to torch");
  const RowNormKernel& k = tables(x.device().type()).row_norm;
  TORCH_CHECK_NOT_IMPLEMENTED(k.forward, f.name, ": no kernels for ", x.device().type());
  return k;
}

RowNormArgs arguments(const Family& f, const Tensor& x, int64_t dims) {
  RowNormArgs a{};
  a.dtype = x.scalar_type();
  a.n = c10::multiply_integers(x.sizes().slice(x.dim() - dims));
  a.rows = x.numel() / a.n;
  a.centered = f.centered;
  a.stream = stream_of(x);
  return a;
}

// The weight or the bias in what x is computed in, contiguous.
Tensor per_element(const Family& f, const char* what, const MaybeTensor& t, const Tensor& x,
                   int64_t dims) {
  if (!t || !t->defined()) return {};
  TORCH_CHECK(t->sizes() == x.sizes().slice(x.dim() - dims), f.name, ": expected a ", what,
              " of shape ", x.sizes().slice(x.dim() - dims), ", got ", t->sizes());
  TORCH_CHECK(t->device() == x.device(), f.name, ": ", what, " is on ", t->device(),
              " and the input on ", x.device());
  return as_dtype(*t, real_of(x.scalar_type())).contiguous();
}

// t, which op calls `what`, contiguous.
Tensor beside(const Family& f, const char* what, const MaybeTensor& t, const Tensor& x) {
  if (!t || !t->defined()) return {};
  check_like(f.name, what, *t, x);
  TORCH_CHECK(t->sizes() == x.sizes(), f.name, ": expected a ", what, " of shape ", x.sizes(),
              ", got ", t->sizes());
  return t->contiguous();
}

const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

void set_statistics(RowNormArgs& a, const Tensor& statistics) {
  auto* rows = static_cast<char*>(statistics.data_ptr());
  if (a.centered) a.mean = rows;
  a.inverse = rows + (a.centered ? statistics.nbytes() / 2 : 0);
}

struct Forward {
  const Family& f;
  Results operator()(const Tensor& input, const MaybeTensor& residual, const MaybeTensor& weight,
                     const MaybeTensor& bias, int64_t dims, double eps) const {
    const RowNormKernel& k = kernel(f, input, dims);
    const c10::DeviceGuard guard(input.device());
    const Tensor x = input.contiguous(), r = beside(f, "residual", residual, x),
                 w = per_element(f, "weight", weight, x, dims),
                 b = per_element(f, "bias", bias, x, dims);
    RowNormArgs a = arguments(f, x, dims);
    Tensor y = output_like(x),
           sum = r.defined() ? output_like(x) : output_beside(x, {0}, x.scalar_type()),
           statistics = output_beside(x, {1 + f.centered, a.rows}, real_of(x.scalar_type()));
    a.eps = eps;
    a.x = x.const_data_ptr();
    a.residual = data(r);
    a.weight = data(w);
    a.bias = data(b);
    a.y = y.mutable_data_ptr();
    if (r.defined()) a.sum = sum.mutable_data_ptr();
    set_statistics(a, statistics);
    check(f.name, k.forward(a));
    return {y, sum, statistics};
  }
};

struct Backward {
  const Family& f;
  Results operator()(const Tensor& grad, const MaybeTensor& grad_sum, const Tensor& input,
                     const MaybeTensor& weight, const Tensor& statistics, int64_t dims,
                     bool to_input, bool to_weight, bool to_bias) const {
    const RowNormKernel& k = kernel(f, input, dims);
    const c10::DeviceGuard guard(input.device());
    const Tensor x = input.contiguous(), dy = beside(f, "grad", grad, x),
                 dsum = beside(f, "grad_sum", grad_sum, x),
                 w = per_element(f, "weight", weight, x, dims), known = statistics.contiguous();
    RowNormArgs a = arguments(f, x, dims);
    const auto real = real_of(x.scalar_type());
    TORCH_CHECK(known.scalar_type() == real && known.device() == x.device() &&
                    known.sizes() == at::IntArrayRef({1 + f.centered, a.rows}),
                f.name, "_backward: expected statistics of shape [", 1 + f.centered, ", ", a.rows,
                "], got ", known.toString(), known.sizes());
    const auto some = [&](bool wanted, at::IntArrayRef sizes, at::ScalarType dtype) {
      return wanted ? output_beside(x, sizes, dtype) : output_beside(x, {0}, dtype);
    };
    const auto shape = x.sizes().slice(x.dim() - dims);
    Tensor dx = some(to_input, x.sizes(), a.dtype), dweight = some(to_weight, shape, real),
           dbias = some(to_bias, shape, real);
    const Tensor workspace =
        output_beside(x, {row_norm_workspace(a.rows, a.n, to_weight + to_bias)}, at::kByte);
    a.x = x.const_data_ptr();
    a.weight = data(w);
    a.dy = dy.const_data_ptr();
    a.dsum = data(dsum);
    if (to_input) a.dx = dx.mutable_data_ptr();
    if (to_weight) a.dweight = dweight.mutable_data_ptr();
    if (to_bias) a.dbias = dbias.mutable_data_ptr();
    a.workspace = workspace.mutable_data_ptr();
    set_statistics(a, known);
    check(f.name, k.backward(a));
    return {dx, dweight, dbias};
  }
};

// ------------------------------------------------------------------------------------------------
// derivatives

enum { kInput, kResidual, kWeight, kBias };                // of the forward op
enum Position { kNormalized, kSavedWeight, kStatistics };  // what backward finds saved

// In torch's own ops, of all that the gradient is computed from; differentiable. In real, so that
// what is rounded is the result alone.
Results composed_backward(const Family& f, const Tensor& grad, const Tensor& grad_sum,
                          const Tensor& input, const Tensor& weight, at::ScalarType of_bias,
                          int64_t dims, double eps) {
  const auto dtype = input.scalar_type(), real = real_of(dtype);
  const Tensor dy = as_dtype(grad, real);
  Tensor x = as_dtype(input, real), w = weight;
  if (w.defined()) w = as_dtype(w, real);
  std::vector<int64_t> inner, outer;
  for (int64_t d = 0; d < x.dim(); ++d) (d < x.dim() - dims ? outer : inner).push_back(d);
  const auto mean = [&](const Tensor& t) { return at::mean(t, inner, /*keepdim=*/true); };
  const auto down = [&](const Tensor& t) { return outer.empty() ? t : at::sum(t, outer); };
  if (f.centered) x = at::sub(x, mean(x));
  const Tensor inverse = at::rsqrt(at::add(mean(at::mul(x, x)), eps)), normal = at::mul(x, inverse),
               g = w.defined() ? at::mul(dy, w) : dy;
  Tensor dx = at::sub(g, at::mul(normal, mean(at::mul(g, normal))));
  if (f.centered) dx = at::sub(dx, mean(g));
  dx = as_dtype(at::mul(dx, inverse), dtype);
  if (grad_sum.defined()) dx = at::add(dx, grad_sum);
  return {dx, as_dtype(down(at::mul(dy, normal)), w.defined() ? weight.scalar_type() : dtype),
          as_dtype(down(dy), of_bias)};
}

variable_list vjp(const variable_list& grads, const BackwardContext& c) {
  const Family& f = *static_cast<const Family*>(c.op);
  const Tensor &dy = grads[0], dsum = grads.size() > 1 ? grads[1] : Tensor();
  const Tensor &x = c.saved[kNormalized], &w = c.saved[kSavedWeight];
  const int64_t dims = c.values[0].toInt();
  const double eps = c.values[1].toDouble();
  const auto of_bias = static_cast<at::ScalarType>(c.values[2].toInt());
  const bool to_input = c.wants(kInput) || c.wants(kResidual);
  variable_list result(4);
  if (!dy.defined()) {
    result[kInput] = result[kResidual] = dsum;
    return result;
  }
  const auto [dx, dweight, dbias] =
      are_plain(dy, dsum, x, w)
          ? f.backward.call(dy, or_none(dsum), x, or_none(w), c.saved[kStatistics], dims, to_input,
                            c.wants(kWeight), c.wants(kBias))
          : composed_backward(f, dy, dsum, x, w, of_bias, dims, eps);
  if (c.wants(kInput)) result[kInput] = dx;
  if (c.wants(kResidual)) result[kResidual] = dx;
  if (c.wants(kWeight)) result[kWeight] = as_dtype(dweight, w.scalar_type());
  if (c.wants(kBias)) result[kBias] = as_dtype(dbias, of_bias);
  return result;
}

struct ForwardAutograd {
  const Family& f;
  Results operator()(DispatchKeySet ks, const Tensor& input, const MaybeTensor& residual,
                     const MaybeTensor& weight, const MaybeTensor& bias, int64_t dims,
                     double eps) const {
    const Tensor r = or_undefined(residual), w = or_undefined(weight), b = or_undefined(bias);
    TORCH_CHECK_NOT_IMPLEMENTED(!call_args::any_dual(input, r, w, b), "forward-mode derivative of ",
                                f.forward.name, " is not implemented");
    Results out = f.forward.below_autograd(ks, input, residual, weight, bias, dims, eps);
    if (!requires_grad(input, r, w, b)) return out;
    const auto& [y, sum, statistics] = out;
    Saved s;
    r.defined() ? s.output(sum) : s.input(input);
    s.input(w);
    s.input(statistics);
    s.value(dims, eps, static_cast<int64_t>(b.defined() ? b.scalar_type() : input.scalar_type()));
    const Tensor* const outputs[] = {&y, &sum};
    record({f.forward.name, &vjp, &f}, {outputs, size_t{r.defined() ? 2u : 1u}},
           edges_of({&input, &r, &w, &b}), s);
    return out;
  }
};

// ------------------------------------------------------------------------------------------------
// registration

// They live as long as the process.
Family layer_norm{"layer_norm", true, {}, {}}, rms_norm{"rms_norm", false, {}, {}};

}  // namespace

void register_row_norms(torch::Library& m) {
  for (Family* f : {&layer_norm, &rms_norm}) {
    const std::string name = f->name;
    Registration(m, f->forward, name,
                 "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, int dims, float "
                 "eps) -> (Tensor output, Tensor sum, Tensor statistics)")
        .kernel(Forward{*f})
        .on(c10::DispatchKey::Autograd, ForwardAutograd{*f});
    Registration(m, f->backward, name + "_backward",
                 "(Tensor grad, Tensor? grad_sum, Tensor input, Tensor? weight, Tensor statistics, "
                 "int dims, bool to_input, bool to_weight, bool to_bias) -> (Tensor, Tensor, "
                 "Tensor)")
        .kernel(Backward{*f})
        .not_differentiable();
  }
}

namespace {

// Whether the kernels take these. It is asked before every call, so that what they do not take, and
// what is wrong, is torch's.
bool takes(const Tensor& input, const MaybeTensor& residual, const std::vector<int64_t>& shape,
           const MaybeTensor& weight, const MaybeTensor& bias) {
  const bool in_python = input.key_set().has(c10::DispatchKey::Python);
  const auto usable = [&](const Tensor& t) {
    return t.is_cpu() && t.layout() == at::kStrided && !t.is_nested() &&
           !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
           t.key_set().has(c10::DispatchKey::Python) == in_python;
  };
  const auto dtype = input.scalar_type();
  const bool reduced = dtype == at::kBFloat16 || dtype == at::kHalf;
  if (!reduced && dtype != at::kFloat && dtype != at::kDouble) return false;
  if (!usable(input) || input.numel() == 0) return false;
  const auto sizes = input.sizes();
  if (shape.empty() || shape.size() > sizes.size()) return false;
  const auto inner = sizes.slice(sizes.size() - shape.size());
  // Nothing deviates from a mean of one: torch's gradient is 0 to the bit.
  if (inner != at::IntArrayRef(shape) || c10::multiply_integers(inner) == 1) return false;
  if (residual &&
      !(usable(*residual) && residual->scalar_type() == dtype && residual->sizes() == sizes &&
        input.is_contiguous() && residual->is_contiguous()))
    return false;
  const auto& first = weight ? weight : bias;
  if (!first) return true;
  const auto of_vectors = first->scalar_type();
  const auto fits = [&](const MaybeTensor& t) {
    return !t || (usable(*t) && t->scalar_type() == of_vectors && t->sizes() == inner);
  };
  return (of_vectors == dtype || (reduced && of_vectors == at::kFloat)) && fits(weight) &&
         fits(bias);
}

}  // namespace

void bind_row_norms(pybind11::module_& m) {
  // (output, sum), the sum empty without a residual; nothing where the kernels do not take these.
  for (const Family* f : {&layer_norm, &rms_norm})
    def(m, f->name,
        [f](const Tensor& input, const MaybeTensor& residual, const std::vector<int64_t>& shape,
            const MaybeTensor& weight, const MaybeTensor& bias,
            std::optional<double> eps) -> std::optional<std::tuple<Tensor, Tensor>> {
          if ((f->centered && !eps) || !takes(input, residual, shape, weight, bias))
            return std::nullopt;
          const double smallest = input.scalar_type() == at::kDouble
                                      ? std::numeric_limits<double>::epsilon()
                                      : std::numeric_limits<float>::epsilon();
          auto [y, sum, statistics] =
              f->forward.call(input, residual, weight, bias, static_cast<int64_t>(shape.size()),
                              eps.value_or(smallest));
          return std::make_tuple(std::move(y), std::move(sum));
        });
}

}  // namespace fastops
