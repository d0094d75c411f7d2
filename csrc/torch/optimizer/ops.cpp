// The dispatcher's op for every kernel of the optimizers' table:
//   adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, ..., Tensor(z!)[] step, *,
//         options, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/jit_type.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "../backend.h"
#include "multi_tensor_step.h"
#include "signature.h"
#include "tensor_impl.h"

namespace fastops {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::TensorImpl;

std::string schema(const OptimizerSignature& signature) {
  const OptimizerKernel& kernel = *signature.kernel;
  std::string s = std::string(kernel.name) + "_(Tensor(a!)[] params, Tensor[] grads";
  char alias = 'b';
  for (const auto* names : {&signature.states, &signature.scalar_states})
    for (const std::string& name : *names) s += std::string(", Tensor(") + alias++ + "!)[] " + name;
  return s + ", *, " + kernel.options + ", Tensor? grad_scale=None, Tensor? found_inf=None) -> ()";
}

// The arguments of an op's call, off the stack.
struct Arguments {
  StepOptions options;
  std::vector<std::vector<Tensor>> lists;  // params, grads, states ..., scalar states ...
  std::optional<Tensor> grad_scale, found_inf;
};

size_t kernel_of(const c10::OperatorHandle& op) {
  const std::string& name = op.schema().name();  // fastops::adam_
  const auto& signatures = optimizer_signatures();
  for (size_t i = 0; i < signatures.size(); ++i)
    if (name == std::string("fastops::") + signatures[i].kernel->name + "_") return i;
  TORCH_INTERNAL_ASSERT(false, name);
}

Arguments arguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  Arguments a;
  a.options.kernel = kernel_of(op);
  const size_t n = op.schema().arguments().size();
  const auto* in = stack.data() + stack.size() - n;
  size_t k = 0;
  for (; in[k].isTensorList(); ++k) a.lists.push_back(in[k].toTensorVector());
  for (const auto& list : a.lists)
    TORCH_CHECK(list.size() == a.lists[0].size(), op.schema().name(), ": ", a.lists[0].size(),
                " params but ", list.size(), " of ",
                op.schema().arguments()[&list - a.lists.data()].name());
  for (double* value = a.options.values; k < n - 2; ++k)
    *value++ = in[k].isBool() ? static_cast<double>(in[k].toBool()) : in[k].toDouble();
  a.grad_scale = in[k].toOptional<Tensor>();
  a.found_inf = in[k + 1].toOptional<Tensor>();
  return a;
}

void step_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Arguments a = arguments(op, *stack);
  const OptimizerKernel& kernel = *optimizer_signatures()[a.options.kernel].kernel;
  MultiTensorStep step;
  for (size_t i = 0; i < a.lists[0].size(); ++i) {
    const auto impl = [&](int list) {
      const auto k = static_cast<size_t>(list);
      TensorImpl* t = a.lists[k][i].unsafeGetTensorImpl();
      TORCH_CHECK(is_plain(t), op.schema().name(), ": ", op.schema().arguments()[k].name(), "[", i,
                  "] is not an ordinary dense tensor on the CPU or a CUDA device");
      return t;
    };
    StepTensors tensors{impl(0), impl(1)};
    for (int k = 0; k < kernel.states; ++k) tensors.states[k] = impl(2 + k);
    for (int k = 0; k < kernel.scalar_states; ++k)
      tensors.scalar_states[k] = impl(2 + kernel.states + k);
    step.add(a.options, static_cast<uint32_t>(i), /*first=*/false, tensors);
  }
  step.run(a.grad_scale, a.found_inf, /*moves_versions=*/false);
  torch::jit::drop(*stack, op.schema().arguments().size());
}

void step_meta(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
}

void step_autograd(const c10::OperatorHandle& op, DispatchKeySet ks, torch::jit::Stack* stack) {
  if (at::GradMode::is_enabled()) {
    const Arguments a = arguments(op, *stack);
    for (const auto& list : a.lists)
      for (const Tensor& t : list)
        TORCH_CHECK(&list == &a.lists[1] || !t.requires_grad(), op.schema().name(),
                    ": call it under torch.no_grad(), as an optimizer's step does");
  }
  at::AutoDispatchBelowAutograd below;
  op.redispatchBoxed(ks & c10::after_autograd_keyset, stack);
}

// torch's own fallback does not move the versions of the tensors in a Tensor(a!)[].
void step_versions(const c10::OperatorHandle& op, DispatchKeySet ks, torch::jit::Stack* stack) {
  const Arguments a = arguments(op, *stack);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(ks & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (size_t k = 0; k < a.lists.size(); ++k)
    if (k != 1)
      for (const Tensor& t : a.lists[k])
        if (!t.is_inference()) torch::autograd::impl::bump_version(t);
}

TORCH_LIBRARY_FRAGMENT(fastops, m) {
  for (const OptimizerSignature& signature : optimizer_signatures()) {
    m.def(schema(signature).c_str(), {at::Tag::pt2_compliant_tag});
    const std::string name = std::string(signature.kernel->name) + "_";
    const auto impl = [&](DispatchKey key, torch::CppFunction f) {
      m.impl(name.c_str(), torch::dispatch(key, std::move(f)));
    };
    impl(DispatchKey::CPU, torch::CppFunction::makeFromBoxedFunction<&step_kernel>());
    if (cuda_built())
      impl(DispatchKey::CUDA, torch::CppFunction::makeFromBoxedFunction<&step_kernel>());
    impl(DispatchKey::Meta, torch::CppFunction::makeFromBoxedFunction<&step_meta>());
    impl(DispatchKey::Autograd, torch::CppFunction::makeFromBoxedFunction<&step_autograd>());
    impl(DispatchKey::ADInplaceOrView, torch::CppFunction::makeFromBoxedFunction<&step_versions>());
  }
}

}  // namespace
}  // namespace fastops
