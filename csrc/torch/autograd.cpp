#include "autograd.h"

#include <ATen/ops/add.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <mutex>
#include <string>
#include <unordered_map>

#include "compat.h"

namespace fastops {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
namespace ca = torch::dynamo::autograd;

struct OpNode final : Node {
  Recipe recipe{};
  c10::SmallVector<SavedVariable, 2> saved;
  c10::SmallVector<bool, 4> is_output;
  c10::SmallVector<c10::IValue, 2> values;
  bool last_use = false;

  std::string name() const override { return recipe.name; }

  void will_release_variables() override { last_use = true; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved) s.reset_data();
  }

  c10::SmallVector<bool, 4> needed() const {
    c10::SmallVector<bool, 4> mask;
    for (size_t k = 0; k < num_outputs(); ++k) mask.push_back(task_should_compute_output(k));
    return mask;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    c10::SmallVector<at::Tensor, 4> tensors;
    for (size_t k = 0; k < saved.size(); ++k)
      tensors.push_back(is_output[k] ? saved[k].unpack(getptr()) : saved[k].unpack());
    bool any = false;
    for (const auto& g : grads) any |= g.defined();
    if (!any) return variable_list(num_outputs());
    const auto mask = needed();
    auto result = recipe.backward(
        grads, {recipe.op, tensors, values, mask, last_use && !at::GradMode::is_enabled()});
    result.resize(num_outputs());
    return result;
  }

  void compiled_args(ca::CompiledNodeArgs& args) const override {
    args.collect(std::string(recipe.name));
    for (size_t k = 0; k < saved.size(); ++k) args.collect(saved[k], is_output[k]);
    for (const auto& v : values) args.collect(v);
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
    for (const auto& v : values) {
      packed.push_back(v);
      types.push_back(v.type());
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
    std::string key = recipe.name;
    for (const size_t count : {saved.size(), values.size(), size_t(num_outputs())})
      key += "_" + std::to_string(count);
    std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = names.find(key); found != names.end()) return found->second;
    const size_t tensors = saved.size(), numbers = values.size(), outputs = num_outputs();
    const Recipe function = recipe;
    auto replay = [=](const variable_list& grads, const std::vector<c10::IValue>& packed) {
      c10::SmallVector<at::Tensor, 4> t;
      c10::SmallVector<bool, 4> wanted;
      for (size_t k = 0; k < tensors; ++k)
        t.push_back(packed[k].isNone() ? at::Tensor() : packed[k].toTensor());
      const auto v = at::ArrayRef<c10::IValue>(packed).slice(tensors, numbers);
      for (size_t k = 0; k < outputs; ++k) wanted.push_back(packed[tensors + numbers + k].toBool());
      auto result = function.backward(grads, {function.op, t, v, wanted, /*last_use=*/false});
      result.resize(outputs);
      return result;
    };
    return names[key] = ca::getPyCompilerInterface()->bind_function(swap.get_py_compiler(), key,
                                                                    replay, types);
  }
};

auto node_of(const Recipe& recipe, torch::autograd::edge_list&& edges, const Saved& saved) {
  auto node = make_node<OpNode>();
  node->recipe = recipe;
  node->values.append(saved.values.begin(), saved.values.end());
  node->set_next_edges(std::move(edges));
  return node;
}

// After the outputs have their history: one of them is saved as what it has become.
void save(OpNode& node, const Saved& saved, bool is_inplace_on_view = false) {
  for (const auto& s : saved.tensors) {
    node.saved.emplace_back(s.tensor, s.is_output, s.is_output && is_inplace_on_view);
    node.is_output.push_back(s.is_output);
  }
}

}  // namespace

at::Tensor sum_of_defined(const at::Tensor& a, const at::Tensor& b) {
  return !a.defined() ? b : !b.defined() ? a : at::add(a, b);
}

torch::autograd::edge_list edges_of(at::ArrayRef<const at::Tensor*> inputs) {
  torch::autograd::edge_list edges;
  edges.reserve(inputs.size());
  for (const at::Tensor* t : inputs)
    edges.push_back(t->defined() ? torch::autograd::impl::gradient_edge(*t)
                                 : torch::autograd::Edge());
  return edges;
}

void record(const Recipe& recipe, at::ArrayRef<const at::Tensor*> outputs,
            torch::autograd::edge_list edges, const Saved& saved) {
  auto node = node_of(recipe, std::move(edges), saved);
  for (const at::Tensor* out : outputs) torch::autograd::set_history(*out, node);
  save(*node, saved);
}

void record_inplace(const Recipe& recipe, at::Tensor& self, torch::autograd::edge_list edges,
                    const Saved& saved) {
  auto node = node_of(recipe, std::move(edges), saved);
  torch::autograd::rebase_history(self, node);
  save(*node, saved, self.is_view());
}

void record_overwriting(const Recipe& recipe, at::ArrayRef<const at::Tensor*> outputs,
                        torch::autograd::edge_list edges, const Saved& saved,
                        at::Tensor& overwritten, const char* message) {
  auto refusal = make_node<torch::autograd::Error>(
      message, torch::autograd::edge_list{torch::autograd::impl::gradient_edge(overwritten)});
  auto node = node_of(recipe, std::move(edges), saved);
  for (const at::Tensor* out : outputs) torch::autograd::set_history(*out, node);
  save(*node, saved);
  torch::autograd::rebase_history(overwritten, std::move(refusal));
}

void check_inplace(const at::Tensor& self, bool requires_grad) {
  torch::autograd::check_inplace(self, requires_grad);
}

void record_not_implemented(const char* name, at::ArrayRef<const at::Tensor*> outputs,
                            at::ArrayRef<const at::Tensor*> inputs) {
  auto node = make_node<torch::autograd::NotImplemented>(name, edges_of(inputs));
  for (const at::Tensor* out : outputs) torch::autograd::set_history(*out, node);
}

}  // namespace fastops
