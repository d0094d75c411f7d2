// Elementwise ops as torch sees them: for every row `name`, `name_`, `name_backward` and
// `name_second`, their schemas, checks and derivatives. No formula, no row by name.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>

#include "../math.h"
#include "autocast.h"
#include "autograd.h"
#include "backend.h"
#include "bind.h"
#include "layout.h"

namespace fastops {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;

// The four ops of a row with parameters P (all double).
template <class... P>
struct Ops {
  std::string name;
  bool from_output;
  c10::TypedOperatorHandle<Tensor(const Tensor&, P...)> forward;
  c10::TypedOperatorHandle<void(Tensor&, P...)> inplace;
  c10::TypedOperatorHandle<Tensor(const Tensor&, const Tensor&, P...)> backward;
  c10::TypedOperatorHandle<Tensor(const Tensor&, const Tensor&, const Tensor&, P...)> second;
};
constexpr size_t kMaxRows = 64;

// By row number. Filled on first use of a row; ops outlive it.
template <class... P>
const Ops<P...>& ops(size_t row) {
  static std::array<std::unique_ptr<const Ops<P...>>, kMaxRows> cache;
  static std::mutex mutex;
  static std::array<std::atomic<const Ops<P...>*>, kMaxRows> ready{};
  if (const auto* found = ready[row].load(std::memory_order_acquire)) return *found;
  std::lock_guard<std::mutex> lock(mutex);
  if (!cache[row]) {
    const ElementwiseKernel& r = tables(c10::DeviceType::CPU).elementwise.data[row];
    const std::string n = r.name;
    cache[row] = std::make_unique<const Ops<P...>>(Ops<P...>{
        n, r.from_output, find_op<Tensor(const Tensor&, P...)>(n),
        find_op<void(Tensor&, P...)>(n + "_"),
        find_op<Tensor(const Tensor&, const Tensor&, P...)>(n + "_backward"),
        find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, P...)>(n + "_second")});
    ready[row].store(cache[row].get(), std::memory_order_release);
  }
  return *cache[row];
}

// ------------------------------------------------------------------------------------------------
// kernels

template <class... P>
void run(size_t row, ElementwiseLauncher ElementwiseKernel::* kernel, const Tensor& out,
         std::initializer_list<const Tensor*> in, P... p) {
  if (out.numel() == 0) return;
  const c10::DeviceGuard guard(out.device());
  const ElementwiseKernel& r = tables(out.device().type()).elementwise.data[row];
  const double params[sizeof...(P) + 1] = {p...};
  ElementwiseArgs args{out.scalar_type(), out.numel(), out.mutable_data_ptr(), {}, params,
                       stream_of(out)};
  size_t k = 0;
  for (const Tensor* t : in) args.in[k++] = t->const_data_ptr();
  check(r.name, (r.*kernel)(args));
}

const char* name_of(size_t row) { return tables(c10::DeviceType::CPU).elementwise.data[row].name; }

void check_same(const char* op, const Tensor& a, const Tensor& b) {
  TORCH_CHECK(
      a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() && a.device() == b.device(), op,
      ": expected tensors of one shape, dtype and device, got ", a.toString(), a.sizes(), " and ",
      b.toString(), b.sizes());
}

template <class... P>
struct Forward {
  size_t row;
  explicit Forward(size_t row) : row(row) {}
  Tensor operator()(const Tensor& input, P... p) {
    check_dtype(name_of(row), input);
    if (input.is_non_overlapping_and_dense()) {
      Tensor y = output_like(input);
      run(row, &ElementwiseKernel::forward, y, {&input}, p...);
      return y;
    }
    const Tensor y = dense(input);
    run(row, &ElementwiseKernel::forward, y, {&y}, p...);
    return y;
  }
};

template <class... P>
struct Inplace {
  size_t row;
  explicit Inplace(size_t row) : row(row) {}
  void operator()(Tensor& self, P... p) {
    check_dtype(name_of(row), self);
    if (self.is_non_overlapping_and_dense()) {
      run(row, &ElementwiseKernel::forward, self, {&self}, p...);
      return;
    }
    at::assert_no_internal_overlap(self);
    const Tensor y = dense(self);
    run(row, &ElementwiseKernel::forward, y, {&y}, p...);
    self.copy_(y);
  }
};

template <class... P>
struct BackwardOp {
  size_t row;
  explicit BackwardOp(size_t row) : row(row) {}
  Tensor operator()(const Tensor& saved, const Tensor& grad, P... p) {
    check_same(name_of(row), saved, grad);
    const Tensor s = dense(saved), dy = matching(grad, s);
    Tensor dx = output_like(s);
    run(row, &ElementwiseKernel::backward, dx, {&s, &dy}, p...);
    return dx;
  }
};

template <class... P>
struct Second {
  size_t row;
  explicit Second(size_t row) : row(row) {}
  Tensor operator()(const Tensor& saved, const Tensor& grad, const Tensor& grad_grad, P... p) {
    check_same(name_of(row), saved, grad);
    check_same(name_of(row), saved, grad_grad);
    const Tensor s = dense(saved), dy = matching(grad, s), ddx = matching(grad_grad, s);
    Tensor ds = output_like(s);
    run(row, &ElementwiseKernel::second, ds, {&s, &dy, &ddx}, p...);
    return ds;
  }
};

// ------------------------------------------------------------------------------------------------
// derivatives

// Attributes are the row and its parameters.
template <size_t... I>
auto unpack(const std::vector<c10::IValue>& attributes, std::index_sequence<I...>) {
  return std::make_tuple(attributes[I + 1].toDouble()...);
}
template <class... P, class F>
auto with_attributes(const std::vector<c10::IValue>& attributes, F f) {
  const auto& op = ops<P...>(static_cast<size_t>(attributes[0].toInt()));
  return std::apply([&](auto... p) { return f(op, p...); },
                    unpack(attributes, std::index_sequence_for<P...>{}));
}

template <class... P>
variable_list forward_vjp(const variable_list& grads, const BackwardContext& c) {
  return with_attributes<P...>(c.attributes, [&](const auto& op, auto... p) {
    return variable_list{op.backward.call(c.saved[0], grads[0], p...)};
  });
}

// Of backward(s, dy): to s by the second derivative, to dy by backward itself, which is linear in
// it.
template <class... P>
variable_list backward_vjp(const variable_list& grads, const BackwardContext& c) {
  return with_attributes<P...>(c.attributes, [&](const auto& op, auto... p) {
    variable_list result(2);
    if (c.needed[0]) result[0] = op.second.call(c.saved[0], c.saved[1], grads[0], p...);
    if (c.needed[1]) result[1] = op.backward.call(c.saved[0], grads[0], p...);
    return result;
  });
}

template <class... P>
struct ForwardAutograd {
  size_t row;
  std::string label;
  explicit ForwardAutograd(size_t row) : row(row), label("fastops::" + std::string(name_of(row))) {}
  Tensor operator()(DispatchKeySet ks, const Tensor& input, P... p) {
    const auto& op = ops<P...>(row);
    Tensor y;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      y = op.forward.redispatch(ks & c10::after_autograd_keyset, input, p...);
    }
    Tensor dy;
    if (is_dual(input))
      dy = op.backward.call(op.from_output ? y : primal(input), tangent(input), p...);
    set_tangent(y, dy);
    if (requires_grad(input))
      record(label.c_str(), &forward_vjp<P...>, {y}, {input},
             {{op.from_output ? y : input, op.from_output}}, {static_cast<int64_t>(row), p...});
    return y;
  }
};

template <class... P>
struct InplaceAutograd {
  size_t row;
  std::string label;
  explicit InplaceAutograd(size_t row)
      : row(row), label("fastops::" + std::string(name_of(row)) + "_") {}
  void operator()(DispatchKeySet ks, Tensor& self, P... p) {
    const auto& op = ops<P...>(row);
    const bool wanted = requires_grad(self), dual = is_dual(self);
    check_inplace(self, wanted);
    // What backward takes is the input, which is about to be gone: keep a copy, as only correctness
    // can be asked here.
    const Tensor original = !op.from_output && (wanted || dual) ? self.clone() : Tensor();
    const Tensor t = dual ? tangent(self) : Tensor();
    auto edges = wanted ? edges_of({self}) : torch::autograd::edge_list();
    {
      at::AutoDispatchBelowAutograd guard;
      op.inplace.redispatch(ks & c10::after_autograd_keyset, self, p...);
    }
    if (dual) {
      const Tensor s = op.from_output ? primal(self) : primal(original);
      self._set_fw_grad(op.backward.call(s, t, p...), /*level=*/0, /*is_inplace_op=*/true);
    }
    if (wanted)
      record_inplace(label.c_str(), &forward_vjp<P...>, self, std::move(edges),
                     {op.from_output ? Save{self, true} : Save{original.detach(), false}},
                     {static_cast<int64_t>(row), p...});
  }
};

template <class... P>
struct InplaceVersion {
  size_t row;
  explicit InplaceVersion(size_t row) : row(row) {}
  void operator()(DispatchKeySet ks, Tensor& self, P... p) {
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      ops<P...>(row).inplace.redispatch(ks & c10::after_ADInplaceOrView_keyset, self, p...);
    }
    torch::autograd::impl::bump_version(self);
  }
};

template <class... P>
struct BackwardAutograd {
  size_t row;
  std::string label;
  explicit BackwardAutograd(size_t row)
      : row(row), label("fastops::" + std::string(name_of(row)) + "_backward") {}
  Tensor operator()(DispatchKeySet ks, const Tensor& saved, const Tensor& grad, P... p) {
    const auto& op = ops<P...>(row);
    Tensor dx;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      dx = op.backward.redispatch(ks & c10::after_autograd_keyset, saved, grad, p...);
    }
    Tensor t;
    if (is_dual(grad)) t = op.backward.call(primal(saved), tangent(grad), p...);
    if (is_dual(saved)) {
      const Tensor s = op.second.call(primal(saved), primal(grad), tangent(saved), p...);
      t = t.defined() ? at::add(t, s) : s;
    }
    set_tangent(dx, t);
    if (requires_grad(saved, grad))
      record(label.c_str(), &backward_vjp<P...>, {dx}, {saved, grad}, {{saved}, {grad}},
             {static_cast<int64_t>(row), p...});
    return dx;
  }
};

template <class... P>
struct SecondAutograd {
  size_t row;
  std::string label;
  explicit SecondAutograd(size_t row)
      : row(row), label("fastops::" + std::string(name_of(row)) + "_second") {}
  Tensor operator()(DispatchKeySet ks, const Tensor& saved, const Tensor& grad,
                    const Tensor& grad_grad, P... p) {
    TORCH_CHECK_NOT_IMPLEMENTED(!is_dual(saved) && !is_dual(grad) && !is_dual(grad_grad),
                                "forward-mode derivative of ", label, " is not implemented");
    Tensor ds;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      ds = ops<P...>(row).second.redispatch(ks & c10::after_autograd_keyset, saved, grad, grad_grad,
                                            p...);
    }
    if (requires_grad(saved, grad, grad_grad))
      record_not_implemented(label.c_str(), ds, {saved, grad, grad_grad});
    return ds;
  }
};

template <class... P>
struct Autocast {
  size_t row;
  DispatchKey key;
  Tensor operator()(const Tensor& input, P... p) {
    return in_float32(key, input,
                      [&](const Tensor& x) { return ops<P...>(row).forward.call(x, p...); });
  }
};

// ------------------------------------------------------------------------------------------------
// registration

template <class K>
torch::CppFunction functor(size_t row) {
  return torch::CppFunction(K(row));
}

template <class... P>
void define(torch::Library& m, size_t row, const ElementwiseKernel& r) {
  const std::string n = r.name, params = *r.params ? std::string(", ") + r.params : "";
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag, at::Tag::pointwise};
  m.def((n + "(Tensor input" + params + ") -> Tensor").c_str(), tags);
  m.def((n + "_(Tensor(a!) self" + params + ") -> ()").c_str(), {at::Tag::pt2_compliant_tag});
  m.def((n + "_backward(Tensor saved, Tensor grad" + params + ") -> Tensor").c_str(), tags);
  m.def(
      (n + "_second(Tensor saved, Tensor grad, Tensor grad_grad" + params + ") -> Tensor").c_str(),
      tags);
  const auto impl = [&](const std::string& name, DispatchKey key, torch::CppFunction f) {
    m.impl(name.c_str(), torch::dispatch(key, std::move(f)));
  };
  for (const auto key : {DispatchKey::CPU, DispatchKey::CUDA}) {
    if (key == DispatchKey::CUDA && !cuda_built()) continue;
    impl(n, key, functor<Forward<P...>>(row));
    impl(n + "_", key, functor<Inplace<P...>>(row));
    impl(n + "_backward", key, functor<BackwardOp<P...>>(row));
    impl(n + "_second", key, functor<Second<P...>>(row));
  }
  for (const auto key : kAutocastKeys)
    if (has_autocast_rule(key, n)) impl(n, key, torch::CppFunction(Autocast<P...>{row, key}));
  impl(n, DispatchKey::Autograd, functor<ForwardAutograd<P...>>(row));
  impl(n + "_", DispatchKey::Autograd, functor<InplaceAutograd<P...>>(row));
  impl(n + "_", DispatchKey::ADInplaceOrView, functor<InplaceVersion<P...>>(row));
  impl(n + "_backward", DispatchKey::Autograd, functor<BackwardAutograd<P...>>(row));
  impl(n + "_second", DispatchKey::Autograd, functor<SecondAutograd<P...>>(row));
}

template <class... P>
void bind(pybind11::module_& m, size_t row, const ElementwiseKernel& r) {
  def(m, r.name,
      [row](const Tensor& input, P... p) { return ops<P...>(row).forward.call(input, p...); });
  def(m, std::string(r.name) + "_", [row](Tensor& self, P... p) {
    ops<P...>(row).inplace.call(self, p...);
    return self;
  });
}

// Calls f.operator()<double, ...>(row number, row) with as many doubles as the row has parameters.
template <class F>
void each_row(F f) {
  size_t i = 0;
  for (const ElementwiseKernel& r : tables(c10::DeviceType::CPU).elementwise) {
    switch (count_params(r.params)) {
      case 0:
        f.template operator()<>(i, r);
        break;
      case 1:
        f.template operator()<double>(i, r);
        break;
      case 2:
        f.template operator()<double, double>(i, r);
        break;
      case 3:
        f.template operator()<double, double, double>(i, r);
        break;
      default:
        TORCH_INTERNAL_ASSERT(false, "a formula with more than three parameters: ", r.name);
    }
    ++i;
  }
  TORCH_INTERNAL_ASSERT(i <= kMaxRows);
}

TORCH_LIBRARY_FRAGMENT(fastops, m) {
  each_row([&]<class... P>(size_t i, const ElementwiseKernel& r) { define<P...>(m, i, r); });
}

}  // namespace

void bind_elementwise(pybind11::module_& m) {
  each_row([&]<class... P>(size_t i, const ElementwiseKernel& r) { bind<P...>(m, i, r); });
  // What backward takes: the output (true) or the input.
  m.def("from_output", [](const std::string& name) {
    for (const ElementwiseKernel& r : tables(c10::DeviceType::CPU).elementwise)
      if (name == r.name) return r.from_output;
    throw pybind11::key_error("no elementwise op '" + name + "'");
  });
}

}  // namespace fastops
