// Dropout, alone and fused with its neighbours, as torch sees it. Dropout is a pure function of
// (input, p, seed) and linear in the input, so it is its own derivative: nothing but the seed is
// saved, and the mask is made again. The seed is one torch.randint, which is where manual_seed,
// fork_rng, generators, graph capture and vmap's randomness come in.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <string_view>

#include "autograd.h"
#include "backend.h"
#include "bind.h"
#include "layout.h"

namespace fastops {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;

auto dropout_op() {
  static const auto op = find_op<Tensor(const Tensor&, double, const Tensor&)>("dropout");
  return op;
}
auto dropout_inplace_op() {
  static const auto op = find_op<void(Tensor&, double, const Tensor&)>("dropout_");
  return op;
}

const DropoutKernel& row_of(const char* name, c10::DeviceType device) {
  for (const DropoutKernel& row : tables(device).dropout)
    if (std::string_view(name) == row.name) return row;
  TORCH_INTERNAL_ASSERT(false, "no row ", name);
}

void check_arguments(const char* name, const Tensor& input, double p, const Tensor& seed) {
  check_dtype(name, input);
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "fastops::", name, ": p must be in [0, 1), got ", p);
  TORCH_CHECK(
      seed.scalar_type() == at::kLong && seed.numel() == 1 && seed.device() == input.device(),
      "fastops::", name, ": seed must be one int64 on ", input.device(), ", got ", seed.toString(),
      seed.sizes(), " on ", seed.device());
}

void run(const char* name, const Tensor& out, std::initializer_list<const Tensor*> in,
         const LogicalOrder& order, double p, const Tensor& seed, const Tensor& sums = Tensor()) {
  if (out.numel() == 0) return;
  const c10::DeviceGuard guard(out.device());
  const DropoutKernel& row = row_of(name, out.device().type());
  DropoutArgs a{};
  a.dtype = out.scalar_type();
  a.n = out.numel();
  a.out = out.mutable_data_ptr();
  size_t k = 0;
  for (const Tensor* t : in) a.in[k++] = t->const_data_ptr();
  a.period = out.dim() ? out.size(-1) : 1;
  a.seed = seed.const_data_ptr<int64_t>();
  a.threshold = static_cast<uint32_t>(std::min(std::nearbyint(std::ldexp(p, 32)), 4294967295.0));
  a.scale = 1 / (1 - p);
  a.order = order;
  a.stream = stream_of(out);
  if (sums.defined()) a.sums = sums.mutable_data_ptr();
  check(row.name, (sums.defined() ? row.summed : row.forward)(a));
}

// The op of one tensor, in the layout that torch's elementwise ops would give the result.
Tensor result_of(const char* name, const Tensor& input, double p, const Tensor& seed) {
  const Tensor x = dense(input);
  if (const auto order = logical_order(x)) {
    Tensor y = x.is_same(input) ? output_like(x) : x;
    run(name, y, {&x}, *order, p, seed);
    return y;
  }
  const Tensor z =
      x.contiguous();  // the mask follows the logical order, which x is too permuted for
  run(name, z, {&z}, *logical_order(z), p, seed);
  return output_like(x).copy_(z);
}

void overwrite(const char* name, Tensor& self, double p, const Tensor& seed) {
  if (self.is_non_overlapping_and_dense())
    if (const auto order = logical_order(self)) return run(name, self, {&self}, *order, p, seed);
  at::assert_no_internal_overlap(self);
  self.copy_(result_of(name, self, p, seed));
}

Tensor dropout(const Tensor& input, double p, const Tensor& seed) {
  check_arguments("dropout", input, p, seed);
  return result_of("dropout", input, p, seed);
}

void dropout_inplace(Tensor& self, double p, const Tensor& seed) {
  check_arguments("dropout", self, p, seed);
  overwrite("dropout", self, p, seed);
}

variable_list dropout_vjp(const variable_list& grads, const BackwardContext& c) {
  variable_list result(2);
  if (c.needed[0]) result[0] = dropout_op().call(grads[0], c.attributes[0].toDouble(), c.saved[0]);
  return result;
}

Tensor dropout_autograd(DispatchKeySet ks, const Tensor& input, double p, const Tensor& seed) {
  Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    y = dropout_op().redispatch(ks & c10::after_autograd_keyset, input, p, seed);
  }
  Tensor dy;
  if (is_dual(input)) dy = dropout_op().call(tangent(input), p, seed);
  set_tangent(y, dy);
  if (requires_grad(input))
    record("fastops::dropout", &dropout_vjp, {y}, {input, seed}, {{seed}}, {p});
  return y;
}

void dropout_inplace_autograd(DispatchKeySet ks, Tensor& self, double p, const Tensor& seed) {
  const bool wanted = requires_grad(self), dual = is_dual(self);
  check_inplace(self, wanted);
  const Tensor t = dual ? dropout_op().call(tangent(self), p, seed) : Tensor();
  auto edges = wanted ? edges_of({self, seed}) : torch::autograd::edge_list();
  {
    at::AutoDispatchBelowAutograd guard;
    dropout_inplace_op().redispatch(ks & c10::after_autograd_keyset, self, p, seed);
  }
  if (dual) self._set_fw_grad(t, /*level=*/0, /*is_inplace_op=*/true);
  if (wanted)
    record_inplace("fastops::dropout_", &dropout_vjp, self, std::move(edges), {{seed}}, {p});
}

void dropout_inplace_version(DispatchKeySet ks, Tensor& self, double p, const Tensor& seed) {
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    dropout_inplace_op().redispatch(ks & c10::after_ADInplaceOrView_keyset, self, p, seed);
  }
  torch::autograd::impl::bump_version(self);
}

// ------------------------------------------------------------------------------------------------
// relu, then dropout

// What is 0 in the output was dropped or not positive, so that the output is all that backward
// needs.

auto relu_dropout_op() {
  static const auto op = find_op<Tensor(const Tensor&, double, const Tensor&)>("relu_dropout");
  return op;
}
auto relu_dropout_inplace_op() {
  static const auto op = find_op<void(Tensor&, double, const Tensor&)>("relu_dropout_");
  return op;
}

Tensor relu_dropout(const Tensor& input, double p, const Tensor& seed) {
  check_arguments("relu_dropout", input, p, seed);
  return result_of("relu_dropout", input, p, seed);
}

void relu_dropout_inplace(Tensor& self, double p, const Tensor& seed) {
  check_arguments("relu_dropout", self, p, seed);
  overwrite("relu_dropout", self, p, seed);
}

// In ops that can be differentiated again.
Tensor relu_dropout_derivative(const Tensor& y, const Tensor& dy, double p) {
  static const auto relu_backward = find_op<Tensor(const Tensor&, const Tensor&)>("relu_backward");
  return at::mul(relu_backward.call(y, dy), 1 / (1 - p));
}

variable_list relu_dropout_vjp(const variable_list& grads, const BackwardContext& c) {
  variable_list result(2);
  if (!c.needed[0]) return result;
  const Tensor &y = c.saved[0], &dy = grads[0];
  const double p = c.attributes[0].toDouble();
  if (!are_plain(y, dy)) {
    result[0] = relu_dropout_derivative(y, dy, p);
    return result;
  }
  const Tensor s = dense(y), g = matching(resolved(dy), s), dx = output_like(s);
  if (s.numel() > 0) {
    const c10::DeviceGuard guard(s.device());
    DropoutArgs a{};
    a.dtype = s.scalar_type();
    a.n = s.numel();
    a.out = dx.mutable_data_ptr();
    a.in[0] = s.const_data_ptr();
    a.in[1] = g.const_data_ptr();
    a.scale = 1 / (1 - p);
    a.stream = stream_of(s);
    check("relu_dropout", row_of("relu_dropout", s.device().type()).backward(a));
  }
  result[0] = dx;
  return result;
}

Tensor relu_dropout_autograd(DispatchKeySet ks, const Tensor& input, double p, const Tensor& seed) {
  Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    y = relu_dropout_op().redispatch(ks & c10::after_autograd_keyset, input, p, seed);
  }
  set_tangent(y, is_dual(input) ? relu_dropout_derivative(y, tangent(input), p) : Tensor());
  if (requires_grad(input))
    record("fastops::relu_dropout", &relu_dropout_vjp, {y}, {input, seed}, {{y, true}}, {p});
  return y;
}

void relu_dropout_inplace_autograd(DispatchKeySet ks, Tensor& self, double p, const Tensor& seed) {
  const bool wanted = requires_grad(self), dual = is_dual(self);
  check_inplace(self, wanted);
  const Tensor t = dual ? tangent(self) : Tensor();
  auto edges = wanted ? edges_of({self, seed}) : torch::autograd::edge_list();
  {
    at::AutoDispatchBelowAutograd guard;
    relu_dropout_inplace_op().redispatch(ks & c10::after_autograd_keyset, self, p, seed);
  }
  if (dual)
    self._set_fw_grad(relu_dropout_derivative(primal(self), t, p), /*level=*/0,
                      /*is_inplace_op=*/true);
  if (wanted)
    record_inplace("fastops::relu_dropout_", &relu_dropout_vjp, self, std::move(edges),
                   {{self, true}}, {p});
}

void relu_dropout_inplace_version(DispatchKeySet ks, Tensor& self, double p, const Tensor& seed) {
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    relu_dropout_inplace_op().redispatch(ks & c10::after_ADInplaceOrView_keyset, self, p, seed);
  }
  torch::autograd::impl::bump_version(self);
}

// ------------------------------------------------------------------------------------------------
// residual + dropout(x + bias)

using BiasDropoutAdd = Tensor(const Tensor&, const Tensor&, const Tensor&, double, const Tensor&);
auto bias_dropout_add_op() {
  static const auto op = find_op<BiasDropoutAdd>("bias_dropout_add");
  return op;
}

Tensor bias_dropout_add(const Tensor& input, const Tensor& bias, const Tensor& residual, double p,
                        const Tensor& seed) {
  check_arguments("bias_dropout_add", input, p, seed);
  check_like("bias_dropout_add", "bias", bias, input);
  check_row("bias_dropout_add", "bias", bias, input);
  check_like("bias_dropout_add", "residual", residual, input);
  TORCH_CHECK(residual.sizes() == input.sizes(),
              "bias_dropout_add: expected a residual of the input's shape ", input.sizes(),
              ", got ", residual.sizes());
  const Tensor x = input.contiguous(), b = bias.contiguous(), r = residual.contiguous();
  Tensor y = output_like(x);
  run("bias_dropout_add", y, {&x, &b, &r}, *logical_order(y), p, seed);
  return y;
}

variable_list bias_dropout_add_vjp(const variable_list& grads, const BackwardContext& c) {
  variable_list result(4);
  const Tensor& dy = grads[0];
  const double p = c.attributes[0].toDouble();
  if (c.needed[1] && are_plain(dy) && has_rows(dy)) {
    const Tensor g = resolved(dy).contiguous(), dx = output_like(g);
    const Tensor strips = strips_beside(g);
    run("dropout", dx, {&g}, *logical_order(dx), p, c.saved[0], strips);
    if (c.needed[0]) result[0] = dx;
    result[1] = sum_of_strips(strips, dy.scalar_type());
  } else if (c.needed[0] || c.needed[1]) {
    const Tensor dx = dropout_op().call(dy, p, c.saved[0]);
    if (c.needed[0]) result[0] = dx;
    if (c.needed[1]) result[1] = sum_to_row(dx);
  }
  if (c.needed[2]) result[2] = dy;
  return result;
}

Tensor bias_dropout_add_autograd(DispatchKeySet ks, const Tensor& input, const Tensor& bias,
                                 const Tensor& residual, double p, const Tensor& seed) {
  Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    y = bias_dropout_add_op().redispatch(ks & c10::after_autograd_keyset, input, bias, residual, p,
                                         seed);
  }
  Tensor t;
  if (is_dual(input)) t = tangent(input);
  if (is_dual(bias))
    t = t.defined() ? at::add(t, tangent(bias)) : tangent(bias).expand(y.sizes()).contiguous();
  if (t.defined()) t = dropout_op().call(t, p, seed);
  if (is_dual(residual)) t = t.defined() ? at::add(t, tangent(residual)) : tangent(residual);
  set_tangent(y, t);
  if (requires_grad(input, bias, residual))
    record("fastops::bias_dropout_add", &bias_dropout_add_vjp, {y}, {input, bias, residual, seed},
           {{seed}}, {p});
  return y;
}

// ------------------------------------------------------------------------------------------------
// registration

// torch.nn.functional.dropout's own cases around the op: nothing to do, and nothing left.
struct UserDropout {
  Tensor operator()(Tensor& input, double p, bool training, bool inplace,
                    const std::optional<at::Generator>& generator) const {
    TORCH_CHECK_VALUE(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ",
                      p);
    if (!training || p == 0 || input.sym_numel() == 0) return input;
    if (p == 1) {
      const Tensor none = at::zeros({}, input.options());
      return inplace ? input.mul_(none) : at::mul(input, none);
    }
    const Tensor seed = at::randint(std::numeric_limits<int64_t>::max(), {}, generator,
                                    input.options().dtype(at::kLong));
    if (!inplace) return dropout_op().call(input, p, seed);
    dropout_inplace_op().call(input, p, seed);
    return input;
  }
};

TORCH_LIBRARY_FRAGMENT(fastops, m) {
  m.def("dropout(Tensor input, float p, Tensor seed) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("dropout_(Tensor(a!) self, float p, Tensor seed) -> ()", {at::Tag::pt2_compliant_tag});
  m.def("relu_dropout(Tensor input, float p, Tensor seed) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("relu_dropout_(Tensor(a!) self, float p, Tensor seed) -> ()", {at::Tag::pt2_compliant_tag});
  m.def(
      "bias_dropout_add(Tensor input, Tensor bias, Tensor residual, float p, Tensor seed) -> "
      "Tensor",
      {at::Tag::pt2_compliant_tag});
  for (const auto key : {DispatchKey::CPU, DispatchKey::CUDA}) {
    if (key == DispatchKey::CUDA && !cuda_built()) continue;
    m.impl("dropout", torch::dispatch(key, &dropout));
    m.impl("dropout_", torch::dispatch(key, &dropout_inplace));
    m.impl("relu_dropout", torch::dispatch(key, &relu_dropout));
    m.impl("relu_dropout_", torch::dispatch(key, &relu_dropout_inplace));
    m.impl("bias_dropout_add", torch::dispatch(key, &bias_dropout_add));
  }
  m.impl("dropout", torch::dispatch(DispatchKey::Autograd, &dropout_autograd));
  m.impl("dropout_", torch::dispatch(DispatchKey::Autograd, &dropout_inplace_autograd));
  m.impl("dropout_", torch::dispatch(DispatchKey::ADInplaceOrView, &dropout_inplace_version));
  m.impl("relu_dropout", torch::dispatch(DispatchKey::Autograd, &relu_dropout_autograd));
  m.impl("relu_dropout_", torch::dispatch(DispatchKey::Autograd, &relu_dropout_inplace_autograd));
  m.impl("relu_dropout_",
         torch::dispatch(DispatchKey::ADInplaceOrView, &relu_dropout_inplace_version));
  m.impl("bias_dropout_add", torch::dispatch(DispatchKey::Autograd, &bias_dropout_add_autograd));
}

}  // namespace

void bind_dropout(pybind11::module_& m) {
  def(m, "dropout", UserDropout{}, pybind11::arg("input"), pybind11::arg("p"),
      pybind11::arg("training"), pybind11::arg("inplace") = false,
      pybind11::arg("generator") = pybind11::none());
  def(m, "relu_dropout", [](const Tensor& input, double p, const Tensor& seed) {
    return relu_dropout_op().call(input, p, seed);
  });
  def(m, "relu_dropout_", [](Tensor& self, double p, const Tensor& seed) {
    relu_dropout_inplace_op().call(self, p, seed);
    return self;
  });
  def(m, "bias_dropout_add",
      [](const Tensor& input, const Tensor& bias, const Tensor& residual, double p,
         const Tensor& seed) {
        return bias_dropout_add_op().call(input, bias, residual, p, seed);
      });
}

}  // namespace fastops
