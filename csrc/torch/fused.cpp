// Activations fused with the addition before them, as torch sees them: schemas, checks and
// derivatives.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "autograd.h"
#include "backend.h"
#include "bind.h"
#include "layout.h"

namespace fastops {

using at::Tensor;

namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

const KernelTable<FusedKernel>& table(c10::DeviceType device) { return tables(device).fused; }
const FusedKernel& cpu_row(size_t row) { return table(c10::DeviceType::CPU).data[row]; }

struct Ops {
  c10::TypedOperatorHandle<Tensor(const Tensor&, const Tensor&)> forward;
  c10::TypedOperatorHandle<void(Tensor&, const Tensor&)> inplace;
  c10::TypedOperatorHandle<Tensor(const Tensor&, const Tensor&)>
      activation_backward;  // (input or output, grad)
};
const Ops& ops(size_t row) {
  static const auto all = [] {
    std::vector<Ops> found;
    for (const auto& r : table(c10::DeviceType::CPU)) {
      const std::string n = r.name;
      found.push_back(
          {find_op<Tensor(const Tensor&, const Tensor&)>(n),
           find_op<void(Tensor&, const Tensor&)>(n + "_"),
           find_op<Tensor(const Tensor&, const Tensor&)>(std::string(r.activation) + "_backward")});
    }
    return found;
  }();
  return all[row];
}

void check_inputs(size_t row, const Tensor& input, const Tensor& other) {
  const FusedKernel& r = cpu_row(row);
  check_dtype(r.name, input);
  check_like(r.name, r.broadcast ? "bias" : "second tensor", other, input);
  if (r.broadcast) return check_row(r.name, "bias", other, input);
  TORCH_CHECK(input.sizes() == other.sizes(), r.name, ": expected two tensors of one shape, got ",
              input.sizes(), " and ", other.sizes());
}

void run(size_t row, FusedLauncher FusedKernel::* kernel, const Tensor& out,
         std::initializer_list<const Tensor*> in, const Tensor& sums = Tensor()) {
  if (out.numel() == 0) return;
  const c10::DeviceGuard guard(out.device());
  const FusedKernel& r = table(out.device().type()).data[row];
  FusedArgs a{};
  a.dtype = out.scalar_type();
  a.n = out.numel();
  a.period = r.broadcast ? out.size(-1) : out.numel();
  a.out = out.mutable_data_ptr();
  if (sums.defined()) a.sums = sums.mutable_data_ptr();
  a.stream = stream_of(out);
  size_t k = 0;
  for (const Tensor* t : in) a.in[k++] = t->const_data_ptr();
  check(r.name, (r.*kernel)(a));
}

// The input in a memory order in which `other` can be walked beside it.
Tensor walkable(size_t row, const Tensor& t) {
  return cpu_row(row).broadcast ? t.contiguous() : dense(t);
}

struct Forward {
  size_t row;
  Tensor operator()(const Tensor& input, const Tensor& other) {
    check_inputs(row, input, other);
    const Tensor x = walkable(row, input),
                 t = matching(other, cpu_row(row).broadcast ? other.contiguous() : x);
    Tensor y = x.is_same(input) ? output_like(x) : x;
    run(row, &FusedKernel::forward, y, {&x, &t});
    return y;
  }
};

struct Inplace {
  size_t row;
  void operator()(Tensor& self, const Tensor& other) {
    check_inputs(row, self, other);
    at::assert_no_internal_overlap(self);
    at::assert_no_partial_overlap(self, other);
    const Tensor x = walkable(row, self),
                 t = matching(other, cpu_row(row).broadcast ? other.contiguous() : x);
    run(row, &FusedKernel::forward, x, {&x, &t});
    if (!x.is_same(self)) self.copy_(x);
  }
};

// d activation(x + t) / d (x + t) applied to dy, and what of it flows to t where that is wanted;
// saved: the output, or x and t.
std::pair<Tensor, Tensor> derivatives(size_t row, const Tensor& dy,
                                      const std::vector<Tensor>& saved, bool wanted) {
  Tensor dx;
  if (!cpu_row(row).broadcast) {
    dx = ops(row).activation_backward.call(saved[0], dy);
    return {dx, dx};
  }
  const Tensor &x = saved[0], &t = saved[1];
  if (!are_plain(dy, x, t)) {
    dx = ops(row).activation_backward.call(at::add(x, t), dy);
  } else {
    const Tensor a = resolved(x).contiguous(), b = resolved(t).contiguous(),
                 g = resolved(dy).contiguous();
    dx = output_like(a);
    if (wanted && has_rows(a)) {
      const Tensor strips = strips_beside(a);
      run(row, &FusedKernel::summed, dx, {&a, &b, &g}, strips);
      return {dx, sum_of_strips(strips, t.scalar_type())};
    }
    run(row, &FusedKernel::backward, dx, {&a, &b, &g});
  }
  return {dx, wanted ? sum_to_row(dx) : Tensor()};
}

variable_list vjp(const variable_list& grads, const BackwardContext& c) {
  const auto [dx, dt] =
      derivatives(static_cast<size_t>(c.attributes[0].toInt()), grads[0], c.saved, c.needed[1]);
  return {c.needed[0] ? dx : Tensor(), c.needed[1] ? dt : Tensor()};
}

Tensor forward_tangent(size_t row, const Tensor& y, const Tensor& input, const Tensor& other) {
  Tensor t;
  if (is_dual(input)) t = tangent(input);
  if (is_dual(other))
    t = t.defined() ? at::add(t, tangent(other)) : tangent(other).expand_as(input);
  if (!t.defined()) return t;
  if (!cpu_row(row).broadcast) return ops(row).activation_backward.call(y, t);
  return ops(row).activation_backward.call(at::add(primal(input), primal(other)), t);
}

struct ForwardAutograd {
  size_t row;
  Tensor operator()(DispatchKeySet ks, const Tensor& input, const Tensor& other) {
    Tensor y;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      y = ops(row).forward.redispatch(ks & c10::after_autograd_keyset, input, other);
    }
    set_tangent(y, forward_tangent(row, y, input, other));
    if (requires_grad(input, other)) {
      std::vector<Save> saves;
      if (cpu_row(row).broadcast) {
        saves = {{input}, {other}};
      } else {
        saves = {{y, true}};
      }
      record((std::string("fastops::") + cpu_row(row).name).c_str(), &vjp, {y}, {input, other},
             saves, {static_cast<int64_t>(row)});
    }
    return y;
  }
};

struct InplaceAutograd {
  size_t row;
  void operator()(DispatchKeySet ks, Tensor& self, const Tensor& other) {
    const bool wanted = requires_grad(self, other), dual = is_dual(self) || is_dual(other);
    const bool by_input = cpu_row(row).broadcast;
    check_inplace(self, wanted);
    const Tensor original = by_input && (wanted || dual) ? self.clone() : Tensor();
    Tensor t;
    if (dual) {
      t = is_dual(self) ? tangent(self) : at::zeros_like(primal(self));
      if (is_dual(other)) t = at::add(t, tangent(other));
    }
    auto edges = wanted ? edges_of({self, other}) : torch::autograd::edge_list();
    {
      at::AutoDispatchBelowAutograd guard;
      ops(row).inplace.redispatch(ks & c10::after_autograd_keyset, self, other);
    }
    if (dual) {
      const Tensor s = by_input ? at::add(primal(original), primal(other)) : primal(self);
      self._set_fw_grad(ops(row).activation_backward.call(s, t), /*level=*/0,
                        /*is_inplace_op=*/true);
    }
    if (!wanted) return;
    std::vector<Save> saves;
    if (by_input) {
      saves = {{original.detach()}, {other}};
    } else {
      saves = {{self, true}};
    }
    record_inplace((std::string("fastops::") + cpu_row(row).name + "_").c_str(), &vjp, self,
                   std::move(edges), saves, {static_cast<int64_t>(row)});
  }
};

struct InplaceVersion {
  size_t row;
  void operator()(DispatchKeySet ks, Tensor& self, const Tensor& other) {
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      ops(row).inplace.redispatch(ks & c10::after_ADInplaceOrView_keyset, self, other);
    }
    torch::autograd::impl::bump_version(self);
  }
};

TORCH_LIBRARY_FRAGMENT(fastops, m) {
  size_t i = 0;
  for (const FusedKernel& r : table(c10::DeviceType::CPU)) {
    const std::string n = r.name, other = r.broadcast ? "Tensor bias" : "Tensor other";
    m.def((n + "(Tensor input, " + other + ") -> Tensor").c_str(), {at::Tag::pt2_compliant_tag});
    m.def((n + "_(Tensor(a!) self, " + other + ") -> ()").c_str(), {at::Tag::pt2_compliant_tag});
    const auto impl = [&](const std::string& name, DispatchKey key, torch::CppFunction f) {
      m.impl(name.c_str(), torch::dispatch(key, std::move(f)));
    };
    for (const auto key : {DispatchKey::CPU, DispatchKey::CUDA}) {
      if (key == DispatchKey::CUDA && !cuda_built()) continue;
      impl(n, key, torch::CppFunction(Forward{i}));
      impl(n + "_", key, torch::CppFunction(Inplace{i}));
    }
    impl(n, DispatchKey::Autograd, torch::CppFunction(ForwardAutograd{i}));
    impl(n + "_", DispatchKey::Autograd, torch::CppFunction(InplaceAutograd{i}));
    impl(n + "_", DispatchKey::ADInplaceOrView, torch::CppFunction(InplaceVersion{i}));
    ++i;
  }
}

}  // namespace

void bind_fused(pybind11::module_& m) {
  size_t i = 0;
  for (const FusedKernel& r : table(c10::DeviceType::CPU)) {
    def(m, r.name, [i](const Tensor& input, const Tensor& other) {
      return ops(i).forward.call(input, other);
    });
    def(m, std::string(r.name) + "_", [i](Tensor& self, const Tensor& other) {
      ops(i).inplace.call(self, other);
      return self;
    });
    ++i;
  }
}

}  // namespace fastops
