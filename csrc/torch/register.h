// How an op is made known to torch: from its schema, its kernel and its derivative everything that
// the dispatcher holds under the keys CPU, CUDA, Autograd, ADInplaceOrView and Autocast. (Meta is
// fastops/_compile.py's.) All that knows how a call is passed on below a key is in this file.
//
// A derivative is a class of static functions over a family, the object in which a kind keeps the
// handles of the ops that belong together:
//
//   struct Derivative {
//     using Family = ...;
//     // y's tangent; of an input x, x.value and x.tangent, which is undefined where it is 0.
//     static Tensor jvp(const Family&, const Tensor& y, const DualTensor& x, double p);
//     // What backward will find in its context's `saved` and `values`.
//     static void save(const Family&, Saved&, const Tensor& y, const Tensor& x, double p);
//     static variable_list vjp(const variable_list& grads, const BackwardContext&);
//     // Of an op with an in-place form: whether the two above look at x. Then it is copied, else
//     // they are given an undefined one.
//     static bool reads_input(const Family&, double p);
//   };
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "autocast.h"
#include "autograd.h"
#include "backend.h"

namespace fastops {

// ------------------------------------------------------------------------------------------------
// handles

// One of our ops: its name, "fastops::" and its name, and its handle.
template <class Signature>
class Op;
template <class R, class... A>
class Op<R(A...)> {
 public:
  const char* name = nullptr;

  R call(A... a) const { return handle_->call(std::forward<A>(a)...); }
  // On the keys that come after those of autograd.
  R below_autograd(c10::DispatchKeySet ks, A... a) const {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return handle_->redispatch(ks & c10::after_autograd_keyset, std::forward<A>(a)...);
  }
  // The same of an op that overwrites its first argument, whose version has still to be counted.
  R to_version_counter(c10::DispatchKeySet ks, A... a) const {
    const at::AutoDispatchBelowAutograd guard;
    return handle_->redispatch(ks & c10::after_autograd_keyset, std::forward<A>(a)...);
  }
  R below_version_counter(c10::DispatchKeySet ks, A... a) const {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return handle_->redispatch(ks & c10::after_ADInplaceOrView_keyset, std::forward<A>(a)...);
  }

  // An op that is there.
  static Op of(const std::string& name) {
    Op op;
    op.name = kept("fastops::" + name);
    op.handle_ =
        c10::Dispatcher::singleton().findSchemaOrThrow(op.name, "").template typed<R(A...)>();
    return op;
  }

 private:
  std::optional<c10::TypedOperatorHandle<R(A...)>> handle_;
};

// ------------------------------------------------------------------------------------------------
// arguments

// An input of a call under forward-mode AD; both are undefined where the input is.
struct DualTensor {
  at::Tensor value, tangent;
  bool moves() const { return tangent.defined(); }
};

namespace call_args {

using OptionalTensor = std::optional<at::Tensor>;
inline const at::Tensor kUndefined;

template <class T>
constexpr bool is_tensor = std::is_same_v<std::remove_cvref_t<T>, at::Tensor> ||
                           std::is_same_v<std::remove_cvref_t<T>, OptionalTensor>;
inline const at::Tensor& tensor(const at::Tensor& t) { return t; }
inline const at::Tensor& tensor(const OptionalTensor& t) { return t ? *t : kUndefined; }

template <class... A>
bool any_requires_grad(const A&... a) {
  const auto one = []<class T>(const T& t) {
    if constexpr (is_tensor<T>) return tensor(t).defined() && tensor(t).requires_grad();
    return false;
  };
  return at::GradMode::is_enabled() && (one(a) || ...);
}
template <class... A>
bool any_dual(const A&... a) {
  const auto one = []<class T>(const T& t) {
    if constexpr (is_tensor<T>) return is_dual(tensor(t));
    return false;
  };
  return (one(a) || ...);
}
inline DualTensor dual(const at::Tensor& t) {
  return {primal(t), is_dual(t) ? tangent(t) : at::Tensor()};
}
// A tensor as a DualTensor, anything else as it is.
template <class T>
auto unpacked(const T& t) {
  if constexpr (is_tensor<T>) {
    return dual(tensor(t));
  } else {
    return t;
  }
}
template <class... A>
auto pointers(const A&... a) {
  std::array<const at::Tensor*, (size_t(is_tensor<A>) + ... + 0)> found;
  [[maybe_unused]] size_t k = 0;
  const auto add = [&]<class T>(const T& t) {
    if constexpr (is_tensor<T>) found[k++] = &tensor(t);
  };
  (add(a), ...);
  return found;
}

inline std::array<const at::Tensor*, 1> outputs(const at::Tensor& y) { return {&y}; }
template <class... T>
std::array<const at::Tensor*, sizeof...(T)> outputs(const std::tuple<T...>& y) {
  return std::apply([](const auto&... t) { return std::array{&t...}; }, y);
}
inline void set_tangents(const at::Tensor& y, const at::Tensor& t) { set_tangent(y, t); }
template <class... T>
void set_tangents(const std::tuple<T...>& y, const std::tuple<T...>& t) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    (set_tangent(std::get<I>(y), std::get<I>(t)), ...);
  }(std::index_sequence_for<T...>{});
}

}  // namespace call_args

// ------------------------------------------------------------------------------------------------
// kernels of the keys above the back ends

template <class Derivative, class Signature>
struct AutogradKernel;
template <class Derivative, class R, class... A>
struct AutogradKernel<Derivative, R(A...)> {
  const Op<R(A...)>* op;
  const typename Derivative::Family* family;

  R operator()(c10::DispatchKeySet ks, A... a) const {
    R y = op->below_autograd(ks, a...);
    if (call_args::any_dual(a...))
      call_args::set_tangents(y, Derivative::jvp(*family, y, call_args::unpacked(a)...));
    if (call_args::any_requires_grad(a...)) {
      Saved saved;
      Derivative::save(*family, saved, y, a...);
      record({op->name, &Derivative::vjp, family}, call_args::outputs(y),
             edges_of(call_args::pointers(a...)), saved);
    }
    return y;
  }
};

// Of the form that overwrites its first argument and returns nothing.
template <class Derivative, class Signature>
struct InplaceAutogradKernel;
template <class Derivative, class... A>
struct InplaceAutogradKernel<Derivative, void(at::Tensor&, A...)> {
  const Op<void(at::Tensor&, A...)>* op;
  const typename Derivative::Family* family;

  void operator()(c10::DispatchKeySet ks, at::Tensor& self, A... a) const {
    const bool wanted = call_args::any_requires_grad(self, a...),
               dual = call_args::any_dual(self, a...);
    check_inplace(self, wanted);
    if (!wanted && !dual) return op->to_version_counter(ks, self, a...);
    const bool copied = Derivative::reads_input(*family, a...);
    const at::Tensor x = copied ? self.clone() : at::Tensor();
    const DualTensor before{copied ? primal(x) : at::Tensor(),
                            is_dual(self) ? tangent(self) : at::Tensor()};
    auto edges = wanted ? edges_of(call_args::pointers(self, a...)) : torch::autograd::edge_list();
    op->to_version_counter(ks, self, a...);
    if (dual)
      set_tangent_inplace(
          self, Derivative::jvp(*family, primal(self), before, call_args::unpacked(a)...));
    if (!wanted) return;
    Saved saved;
    Derivative::save(*family, saved, self, copied ? x.detach() : x, a...);
    record_inplace({op->name, &Derivative::vjp, family}, self, std::move(edges), saved);
  }
};

template <class Signature>
struct VersionKernel;
template <class R, class... A>
struct VersionKernel<R(at::Tensor&, A...)> {
  const Op<R(at::Tensor&, A...)>* op;
  R operator()(c10::DispatchKeySet ks, at::Tensor& self, A... a) const {
    if constexpr (std::is_void_v<R>) {
      op->below_version_counter(ks, self, a...);
      bump_version(self);
    } else {
      R result = op->below_version_counter(ks, self, a...);
      bump_version(self);
      return result;
    }
  }
};

// Of an op that is not differentiated: who tries to is told so.
template <class Signature>
struct UndifferentiatedKernel;
template <class R, class... A>
struct UndifferentiatedKernel<R(A...)> {
  const Op<R(A...)>* op;
  R operator()(c10::DispatchKeySet ks, A... a) const {
    TORCH_CHECK_NOT_IMPLEMENTED(!call_args::any_dual(a...), "forward-mode derivative of ", op->name,
                                " is not implemented");
    R y = op->below_autograd(ks, a...);
    if (call_args::any_requires_grad(a...))
      record_not_implemented(op->name, call_args::outputs(y), call_args::pointers(a...));
    return y;
  }
};

// Under autocast: the first argument in float32.
template <class Signature>
struct CastingKernel;
template <class R, class... A>
struct CastingKernel<R(const at::Tensor&, A...)> {
  const Op<R(const at::Tensor&, A...)>* op;
  c10::DispatchKey key;
  R operator()(const at::Tensor& input, A... a) const {
    return in_float32(key, input, [&](const at::Tensor& x) { return op->call(x, a...); });
  }
};

// Under autocast: a float32 result, of tensors that are read as they are; `upcast`, argument number
// `position`, asks for it.
template <size_t position, class Signature>
struct UpcastingKernel;
template <size_t position, class R, class... A>
struct UpcastingKernel<position, R(A...)> {
  const Op<R(A...)>* op;
  c10::DispatchKey key;
  R operator()(A... a) const {
    const c10::impl::ExcludeDispatchKeyGuard guard(key);
    std::tuple<A...> given(std::forward<A>(a)...);
    std::get<position>(given) = true;
    return std::apply([&](auto&&... b) { return op->call(b...); }, given);
  }
};

// ------------------------------------------------------------------------------------------------
// registration

// Defines an op, and registers kernels for it, call by call. `op` and the family outlive the
// module.
template <class Signature>
class Registration {
 public:
  Registration(torch::Library& m, Op<Signature>& op, const std::string& name,
               const std::string& schema, std::vector<at::Tag> tags = {})
      : m_(m), op_(op), name_(name) {
    tags.push_back(at::Tag::pt2_compliant_tag);
    m.def((name + schema).c_str(), std::as_const(tags));
    op = Op<Signature>::of(name);
  }

  // The back ends' kernel: a function object of the op's signature.
  template <class F>
  Registration& kernel(F f) {
    on(c10::DispatchKey::CPU, f);
    if (cuda_built()) on(c10::DispatchKey::CUDA, f);
    return *this;
  }
  template <class Derivative>
  Registration& derivative(const typename Derivative::Family& family) {
    return on(c10::DispatchKey::Autograd, AutogradKernel<Derivative, Signature>{&op_, &family});
  }
  template <class Derivative>
  Registration& inplace_derivative(const typename Derivative::Family& family) {
    on(c10::DispatchKey::Autograd, InplaceAutogradKernel<Derivative, Signature>{&op_, &family});
    return counts_versions();
  }
  Registration& counts_versions() {
    return on(c10::DispatchKey::ADInplaceOrView, VersionKernel<Signature>{&op_});
  }
  Registration& not_differentiable() {
    return on(c10::DispatchKey::Autograd, UndifferentiatedKernel<Signature>{&op_});
  }
  // Where torch's autocast has a rule for aten::name: as that, in float32.
  Registration& autocast_as(const std::string& name, const char* overload = "") {
    for (const auto key : kAutocastKeys)
      if (has_autocast_rule(key, name, overload)) on(key, CastingKernel<Signature>{&op_, key});
    return *this;
  }
  template <size_t position>
  Registration& autocast_upcasts() {
    for (const auto key : kAutocastKeys) on(key, UpcastingKernel<position, Signature>{&op_, key});
    return *this;
  }
  template <class F>
  Registration& on(c10::DispatchKey key, F f) {
    m_.impl(name_.c_str(), torch::dispatch(key, torch::CppFunction(std::move(f))));
    return *this;
  }

 private:
  torch::Library& m_;
  Op<Signature>& op_;
  std::string name_;
};

// What module.cpp calls: each kind defines its ops. In this order, as some use those of others.
void register_elementwise(torch::Library& m);
void register_fused(torch::Library& m);
void register_gates(torch::Library& m);
void register_losses(torch::Library& m);
void register_softmax(torch::Library& m);
void register_cross_entropy(torch::Library& m);
void register_dropout(torch::Library& m);
void register_batch_norm(torch::Library& m);
void register_row_norms(torch::Library& m);

}  // namespace fastops
