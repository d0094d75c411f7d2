// The autograd node: one class for every kind. What distinguishes kinds is a function from
// gradients, saved tensors and attributes to gradients; it is pure, so compiled autograd can replay
// it. torch's Node is not a stable interface: this file and its .cpp are the only ones that know
// it.
#pragma once
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <string>
#include <vector>

namespace fastops {

using torch::autograd::variable_list;

struct BackwardContext {
  const std::vector<at::Tensor>& saved;
  const std::vector<c10::IValue>& attributes;
  const std::vector<bool>& needed;  // per input of the forward op: whether its gradient is wanted
  bool last_use;  // the saved tensors are given up after this call, and gradients are not recorded
};
using Backward = variable_list (*)(const variable_list& grads, const BackwardContext&);

struct Save {
  at::Tensor tensor;
  bool is_output = false;
};

// Whether the result of an op on these tensors is to be recorded.
template <class... T>
bool requires_grad(const T&... inputs) {
  return at::GradMode::is_enabled() && ((inputs.defined() && inputs.requires_grad()) || ...);
}
// Whether forward-mode AD is under way on this tensor.
inline bool is_dual(const at::Tensor& t) {
  return t.defined() && t._fw_grad(/*level=*/0).defined();
}

// Whether a backward may take these past the dispatcher: nothing is recorded, and none is a
// subclass or carries a tangent.
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

// Makes `outputs`, whose tangents are set, the results of `name` on `inputs`, with `backward` to
// differentiate them.
void record(const char* name, Backward backward, std::vector<at::Tensor> outputs,
            const std::vector<at::Tensor>& inputs, std::vector<Save> saves,
            std::vector<c10::IValue> attributes);

// Where a gradient to each of these goes, as they are now.
torch::autograd::edge_list edges_of(const std::vector<at::Tensor>& inputs);

// The same after `self`, the first of the inputs, was overwritten by the op. `edges` are those that
// the inputs had before: a view looks for its history anew once it has been written to, and would
// find its own.
void record_inplace(const char* name, Backward backward, at::Tensor& self,
                    torch::autograd::edge_list edges, std::vector<Save> saves,
                    std::vector<c10::IValue> attributes);

// The same after the op has left something else in `overwritten`, which is no result of it: `edges`
// are those that its inputs had before, and who differentiates through `overwritten` from now on
// gets the error `message`.
void record_overwriting(const char* name, Backward backward, std::vector<at::Tensor> outputs,
                        torch::autograd::edge_list edges, std::vector<Save> saves,
                        std::vector<c10::IValue> attributes, at::Tensor& overwritten,
                        const char* message);

// Raises where torch raises on an in-place op: leaves that require grad, some views.
void check_inplace(const at::Tensor& self, bool requires_grad);

// Makes a later backward through `output` raise "derivative for <name> is not implemented".
void record_not_implemented(const char* name, const at::Tensor& output,
                            const std::vector<at::Tensor>& inputs);

// A typed handle of one of our ops.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const std::string& name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(("fastops::" + name).c_str(), "")
      .typed<Signature>();
}

}  // namespace fastops
