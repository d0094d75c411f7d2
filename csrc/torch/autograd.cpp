#include "autograd.h"

#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <mutex>
#include <unordered_map>

namespace fastops {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
namespace ca = torch::dynamo::autograd;

struct OpNode final : Node {
  std::string label;
  Backward backward = nullptr;
  c10::SmallVector<SavedVariable, 2> saved;
  c10::SmallVector<bool, 2> is_output;
  std::vector<c10::IValue> attributes;
  bool last_use = false;

  std::string name() const override { return label; }

  void will_release_variables() override { last_use = true; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved) s.reset_data();
  }

  std::vector<bool> needed() const {
    std::vector<bool> mask(num_outputs());
    for (size_t k = 0; k < mask.size(); ++k) mask[k] = task_should_compute_output(k);
    return mask;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<at::Tensor> tensors;
    tensors.reserve(saved.size());
    for (size_t k = 0; k < saved.size(); ++k)
      tensors.push_back(is_output[k] ? saved[k].unpack(getptr()) : saved[k].unpack());
    bool any = false;
    for (const auto& g : grads) any |= g.defined();
    if (!any) return variable_list(num_outputs());
    const auto mask = needed();
    auto result =
        backward(grads, {tensors, attributes, mask, last_use && !at::GradMode::is_enabled()});
    result.resize(num_outputs());
    return result;
  }

  void compiled_args(ca::CompiledNodeArgs& args) const override {
    args.collect(label);
    for (size_t k = 0; k < saved.size(); ++k) args.collect(saved[k], is_output[k]);
    for (const auto& a : attributes) args.collect(a);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 ca::SwapSavedVariables& swap) override {
    for (auto& s : saved) swap.before(s);
    std::vector<c10::IValue> packed;
    std::vector<at::TypePtr> types;
    for (size_t k = 0; k < saved.size(); ++k) {
      packed.emplace_back(is_output[k] ? saved[k].unpack(getptr()) : saved[k].unpack());
      types.push_back(c10::TensorType::get());
    }
    for (const auto& a : attributes) {
      packed.push_back(a);
      types.push_back(a.type());
    }
    for (const bool wanted : needed()) {
      packed.emplace_back(wanted);
      types.push_back(c10::BoolType::get());
    }
    const auto& compiler = ca::getPyCompilerInterface();
    const auto result = compiler->call_function(
        swap.get_py_compiler(), "apply_functional", bound(swap, types), grads, packed,
        ca::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            ca::get_input_metadata(next_edges())));
    for (auto& s : saved) swap.after(s);
    return result;
  }

 private:
  // The name under which the compiler knows this node's backward, as a function of gradients and
  // packed arguments.
  std::string bound(ca::SwapSavedVariables& swap, const std::vector<at::TypePtr>& types) const {
    static std::mutex mutex;
    static std::unordered_map<std::string, std::string> names;
    const std::string key =
        label + "_" + std::to_string(saved.size()) + "_" + std::to_string(num_outputs());
    std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = names.find(key); found != names.end()) return found->second;
    const size_t tensors = saved.size(), values = attributes.size(), outputs = num_outputs();
    const Backward function = backward;
    auto replay = [=](const variable_list& grads, const std::vector<c10::IValue>& packed) {
      std::vector<at::Tensor> t;
      std::vector<c10::IValue> a;
      std::vector<bool> wanted;
      for (size_t k = 0; k < tensors; ++k)
        t.push_back(packed[k].isNone() ? at::Tensor() : packed[k].toTensor());
      for (size_t k = 0; k < values; ++k) a.push_back(packed[tensors + k]);
      for (size_t k = 0; k < outputs; ++k) wanted.push_back(packed[tensors + values + k].toBool());
      auto result = function(grads, {t, a, wanted, /*last_use=*/false});
      result.resize(outputs);
      return result;
    };
    return names[key] = ca::getPyCompilerInterface()->bind_function(swap.get_py_compiler(), key,
                                                                    replay, types);
  }
};

c10::intrusive_ptr<OpNode> make_node(const char* name, Backward backward,
                                     torch::autograd::edge_list&& edges,
                                     std::vector<c10::IValue>&& attributes) {
  auto node = c10::make_intrusive<OpNode>();
  node->label = name;
  node->backward = backward;
  node->attributes = std::move(attributes);
  node->set_next_edges(std::move(edges));
  return node;
}

void save(OpNode& node, std::vector<Save>& saves, bool is_inplace_on_view = false) {
  for (auto& s : saves) {
    node.saved.emplace_back(s.tensor, s.is_output, s.is_output && is_inplace_on_view);
    node.is_output.push_back(s.is_output);
  }
}

}  // namespace

torch::autograd::edge_list edges_of(const std::vector<at::Tensor>& inputs) {
  torch::autograd::edge_list edges;
  edges.reserve(inputs.size());
  for (const auto& t : inputs)
    edges.push_back(t.defined() ? torch::autograd::impl::gradient_edge(t)
                                : torch::autograd::Edge());
  return edges;
}

void record(const char* name, Backward backward, std::vector<at::Tensor> outputs,
            const std::vector<at::Tensor>& inputs, std::vector<Save> saves,
            std::vector<c10::IValue> attributes) {
  auto node = make_node(name, backward, edges_of(inputs), std::move(attributes));
  for (auto& out : outputs) torch::autograd::set_history(out, node);
  save(*node, saves);  // after set_history: an output is saved as what it has become
}

void record_inplace(const char* name, Backward backward, at::Tensor& self,
                    torch::autograd::edge_list edges, std::vector<Save> saves,
                    std::vector<c10::IValue> attributes) {
  auto node = make_node(name, backward, std::move(edges), std::move(attributes));
  torch::autograd::rebase_history(self, node);
  save(*node, saves, self.is_view());
}

void record_overwriting(const char* name, Backward backward, std::vector<at::Tensor> outputs,
                        torch::autograd::edge_list edges, std::vector<Save> saves,
                        std::vector<c10::IValue> attributes, at::Tensor& overwritten,
                        const char* message) {
  auto refusal = c10::make_intrusive<torch::autograd::Error>(
      message, torch::autograd::edge_list{torch::autograd::impl::gradient_edge(overwritten)});
  auto node = make_node(name, backward, std::move(edges), std::move(attributes));
  for (auto& out : outputs) torch::autograd::set_history(out, node);
  save(*node, saves);
  torch::autograd::rebase_history(overwritten, std::move(refusal));
}

void check_inplace(const at::Tensor& self, bool requires_grad) {
  torch::autograd::check_inplace(self, requires_grad);
}

void record_not_implemented(const char* name, const at::Tensor& output,
                            const std::vector<at::Tensor>& inputs) {
  auto node = c10::make_intrusive<torch::autograd::NotImplemented>(name, edges_of(inputs));
  torch::autograd::set_history(output, node);
}

}  // namespace fastops
