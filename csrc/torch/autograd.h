// The autograd node: one class for every op. What distinguishes ops is a function from gradients,
// saved tensors and saved values to gradients; it is pure, so compiled autograd can replay it.
// torch's Node is not a stable interface: this file and its .cpp are the only ones that know it.
#pragma once
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <initializer_list>
#include <vector>

namespace fastops {

using torch::autograd::variable_list;

// ------------------------------------------------------------------------------------------------
// what backward is given

struct BackwardContext {
  const void* op;  // what was recorded as such
  at::ArrayRef<at::Tensor> saved;
  at::ArrayRef<c10::IValue> values;
  at::ArrayRef<bool> needed;  // per input of the forward op: whether its gradient is wanted
  bool last_use;  // the saved tensors are given up after this call, and gradients are not recorded

  // Whether the gradient to input k is wanted, for inputs that an op may not have.
  bool wants(size_t k) const { return k < needed.size() && needed[k]; }
};
using BackwardFunction = variable_list (*)(const variable_list& grads, const BackwardContext&);

// What an op leaves for its backward, in the order in which that finds it.
struct Saved {
  struct Entry {
    at::Tensor tensor;
    bool is_output;
  };
  c10::SmallVector<Entry, 4> tensors;
  c10::SmallVector<c10::IValue, 4> values;

  void input(const at::Tensor& t) { tensors.push_back({t, false}); }
  void output(const at::Tensor& t) { tensors.push_back({t, true}); }
  template <class... V>
  void value(V... v) {
    (values.emplace_back(v), ...);
  }
};

// ------------------------------------------------------------------------------------------------
// questions to tensors

// Whether the result of an op on these tensors is to be recorded.
template <class... T>
bool requires_grad(const T&... inputs) {
  return at::GradMode::is_enabled() && ((inputs.defined() && inputs.requires_grad()) || ...);
}
// Whether forward-mode AD is under way on this tensor.
inline bool is_dual(const at::Tensor& t) {
  return t.defined() && t._fw_grad(/*level=*/0).defined();
}

// Whether a backward may write to these, or read them past the dispatcher: nothing is recorded,
// and none is a subclass or carries a tangent.
template <class... T>
bool are_plain(const T&... tensors) {
  return !at::GradMode::is_enabled() &&
         ((!is_dual(tensors) && !at::isTensorSubclassLike(tensors)) && ...);
}

inline at::Tensor tangent(const at::Tensor& t) { return t._fw_grad(/*level=*/0); }
inline at::Tensor primal(const at::Tensor& t) { return is_dual(t) ? t._fw_primal(/*level=*/0) : t; }
inline void set_tangent(const at::Tensor& result, const at::Tensor& t) {
  if (t.defined()) result._set_fw_grad(t, /*level=*/0, /*is_inplace_op=*/false);
}
inline void set_tangent_inplace(const at::Tensor& self, const at::Tensor& t) {
  self._set_fw_grad(t, /*level=*/0, /*is_inplace_op=*/true);
}

// The sum of two, of which either may be undefined and is then 0.
at::Tensor sum_of_defined(const at::Tensor& a, const at::Tensor& b);

// ------------------------------------------------------------------------------------------------
// recording

using TensorRefs = std::initializer_list<const at::Tensor*>;

// How an op is differentiated: its name, the function, and what that finds as `op`. All of them
// live as long as the process.
struct Recipe {
  const char* name;
  BackwardFunction backward;
  const void* op;
};

// Where a gradient to each of these goes, as they are now; undefined ones take none.
torch::autograd::edge_list edges_of(at::ArrayRef<const at::Tensor*> inputs);

// Makes `outputs`, whose tangents are set, the results of an op on the inputs that `edges` lead to.
void record(const Recipe& recipe, at::ArrayRef<const at::Tensor*> outputs,
            torch::autograd::edge_list edges, const Saved& saved);

// The same after `self`, the first of the inputs, was overwritten by the op. `edges` are those that
// the inputs had before: a view looks for its history anew once it has been written to, and would
// find its own.
void record_inplace(const Recipe& recipe, at::Tensor& self, torch::autograd::edge_list edges,
                    const Saved& saved);

// The same after the op has left something else in `overwritten`, which is no result of it: `edges`
// are those that its inputs had before, and who differentiates through `overwritten` from now on
// gets the error `message`.
void record_overwriting(const Recipe& recipe, at::ArrayRef<const at::Tensor*> outputs,
                        torch::autograd::edge_list edges, const Saved& saved,
                        at::Tensor& overwritten, const char* message);

// Raises where torch raises on an in-place op: leaves that require grad, some views.
void check_inplace(const at::Tensor& self, bool requires_grad);
// What an in-place op owes to those who have saved the tensor.
inline void bump_version(const at::Tensor& self) { torch::autograd::impl::bump_version(self); }

// Makes a later backward through `outputs` raise "derivative for <name> is not implemented".
void record_not_implemented(const char* name, at::ArrayRef<const at::Tensor*> outputs,
                            at::ArrayRef<const at::Tensor*> inputs);

}  // namespace fastops
