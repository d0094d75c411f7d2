// Dropout as torch sees it. The op is a pure function of (input, p, seed) and linear in the input, so it is its own
// derivative: nothing but the seed is saved, and the mask is made again. The seed is one torch.randint, which is where
// manual_seed, fork_rng, generators, graph capture and vmap's randomness come in.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

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

void check_arguments(const Tensor& input, double p, const Tensor& seed) {
  check_dtype("dropout", input);
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "fastops::dropout: p must be in [0, 1), got ", p);
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.numel() == 1 && seed.device() == input.device(),
              "fastops::dropout: seed must be one int64 on ", input.device(), ", got ", seed.toString(), seed.sizes(),
              " on ", seed.device());
}

void run(const Tensor& out, const Tensor& in, double p, const Tensor& seed) {
  if (out.numel() == 0) return;
  const c10::DeviceGuard guard(out.device());
  const RandomRow& row = tables(out.device().type()).random.data[0];
  RandomArgs a{};
  a.dtype = out.scalar_type();
  a.n = out.numel();
  a.out = out.mutable_data_ptr();
  a.in[0] = in.const_data_ptr();
  a.seed = seed.const_data_ptr<int64_t>();
  a.threshold = static_cast<uint32_t>(std::min(std::nearbyint(std::ldexp(p, 32)), 4294967295.0));
  a.scale = 1 / (1 - p);
  a.order = logical_order(out);
  a.stream = stream_of(out);
  check(row.name, row.forward(a));
}

Tensor dropout(const Tensor& input, double p, const Tensor& seed) {
  check_arguments(input, p, seed);
  const Tensor x = dense(input);
  Tensor y = x.is_same(input) ? output_like(x) : x;
  run(y, x, p, seed);
  return y;
}

void dropout_inplace(Tensor& self, double p, const Tensor& seed) {
  check_arguments(self, p, seed);
  if (self.is_non_overlapping_and_dense()) return run(self, self, p, seed);
  at::assert_no_internal_overlap(self);
  const Tensor x = dense(self);
  run(x, x, p, seed);
  self.copy_(x);
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
  if (requires_grad(input)) record("fastops::dropout", &dropout_vjp, {y}, {input, seed}, {{seed}}, {p});
  return y;
}

void dropout_inplace_autograd(DispatchKeySet ks, Tensor& self, double p, const Tensor& seed) {
  const bool wanted = requires_grad(self), dual = is_dual(self);
  check_inplace(self, wanted);
  const Tensor t = dual ? dropout_op().call(tangent(self), p, seed) : Tensor();
  {
    at::AutoDispatchBelowAutograd guard;
    dropout_inplace_op().redispatch(ks & c10::after_autograd_keyset, self, p, seed);
  }
  if (dual) self._set_fw_grad(t, /*level=*/0, /*is_inplace_op=*/true);
  if (wanted) record_inplace("fastops::dropout_", &dropout_vjp, self, {self, seed}, {{seed}}, {p});
}

void dropout_inplace_version(DispatchKeySet ks, Tensor& self, double p, const Tensor& seed) {
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    dropout_inplace_op().redispatch(ks & c10::after_ADInplaceOrView_keyset, self, p, seed);
  }
  torch::autograd::impl::bump_version(self);
}

// torch.nn.functional.dropout's own cases around the op: nothing to do, and nothing left.
Tensor user_dropout(Tensor input, double p, bool training, bool inplace, std::optional<at::Generator> generator) {
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
  if (!training || p == 0 || input.sym_numel() == 0) return input;
  if (p == 1) {
    const Tensor none = at::zeros({}, input.options());
    return inplace ? input.mul_(none) : at::mul(input, none);
  }
  const Tensor seed =
      at::randint(std::numeric_limits<int64_t>::max(), {}, generator, input.options().dtype(at::kLong));
  if (!inplace) return dropout_op().call(input, p, seed);
  dropout_inplace_op().call(input, p, seed);
  return input;
}

TORCH_LIBRARY_FRAGMENT(fastops, m) {
  m.def("dropout(Tensor input, float p, Tensor seed) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("dropout_(Tensor(a!) self, float p, Tensor seed) -> ()", {at::Tag::pt2_compliant_tag});
  for (const auto key : {DispatchKey::CPU, DispatchKey::CUDA}) {
    if (key == DispatchKey::CUDA && !cuda_built()) continue;
    m.impl("dropout", torch::dispatch(key, &dropout));
    m.impl("dropout_", torch::dispatch(key, &dropout_inplace));
  }
  m.impl("dropout", torch::dispatch(DispatchKey::Autograd, &dropout_autograd));
  m.impl("dropout_", torch::dispatch(DispatchKey::Autograd, &dropout_inplace_autograd));
  m.impl("dropout_", torch::dispatch(DispatchKey::ADInplaceOrView, &dropout_inplace_version));
}

}  // namespace

void bind_random(pybind11::module_& m) {
  m.def("dropout", &user_dropout, pybind11::arg("input"), pybind11::arg("p"), pybind11::arg("training"),
        pybind11::arg("inplace") = false, pybind11::arg("generator") = pybind11::none());
}

}  // namespace fastops
