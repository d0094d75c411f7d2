// The step as an optimizer calls it: parameters, gradients and states are read from the optimizer's
// own dictionaries. No formula, and no option by name.
#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <deque>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../backend.h"
#include "../bind.h"
#include "multi_tensor_step.h"
#include "signature.h"
#include "tensor_impl.h"

namespace fastops {
namespace {

namespace py = pybind11;
using at::Tensor;
using c10::TensorImpl;

// So many parameters ahead of the one looked at, the memory of the next is asked for.
constexpr size_t kAhead = 4;

// Steps an optimizer's parameters as they stand in its `state` and groups. What it keeps between
// steps are memory and guesses (where in a dictionary an entry was), never an assumption: each step
// reads everything anew.
class OptimizerStepper {
 public:
  OptimizerStepper() {
    const auto intern = [](const std::string& name) {
      return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name.c_str()));
    };
    average_key_ = intern("ema");
    for (const OptimizerSignature& signature : signatures_) {
      Keys& keys = keys_.emplace_back();
      for (const std::string& name : signature.states) keys.states.push_back(intern(name));
      for (const std::string& name : signature.scalar_states)
        keys.scalar_states.push_back(intern(name));
    }
  }

  // One step of groups = [(kernel's place in the table, params, options, (seed, step) of stochastic
  // rounding or None), ...], of the parameters that have a gradient. An option is a number, or a
  // tensor on a CUDA device that holds it. Returns None, or, with nothing changed, a pair of lists
  // of (number of the group, parameter): those without state, and those that are not ordinary
  // tensors. `fresh`: the parameters whose state has just been made, `started`: whose average has.
  // `partial`: leave the second kind out. `apart`: some of those all the same, as (number of the
  // group, parameter, [what stands for it, its gradient, states ..., scalar states ...], average or
  // None), ordinary tensors. `check_only`: change nothing at all. `ema_weight`: what of the new
  // parameters goes into the averages that are kept under "ema"; everything, the first time.
  // `max_grad_norm`: scale the gradients so that their norm is no more, and leave the norm in
  // `grad_norm`; returns False, with nothing changed, where the norm is not for the kernels to
  // take.
  py::object step(const py::dict& state, const py::list& groups,
                  const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                  const py::list& fresh, const py::list& started, const py::list& apart,
                  bool partial, bool check_only, std::optional<double> ema_weight,
                  std::optional<double> max_grad_norm) {
    // The kernels run without the interpreter's lock: another thread could come in here, and pull
    // the lists from under them.
    TORCH_CHECK(!stepping_,
                "step() of this optimizer is under way in another thread; one step at a time");
    const Flag stepping(stepping_);
    ema_weight_ = ema_weight;
    multi_tensor_step_.clear();
    fresh_.clear();
    started_.clear();
    for (const auto& p : fresh) fresh_.insert(p.ptr());
    for (const auto& p : started) started_.insert(p.ptr());
    std::vector<std::pair<size_t, PyObject*>> missing, others;

    groups_.clear();
    size_t wanted = 0;
    for (const auto& item : groups) {
      const auto [kernel, params, options, rounding] = py::cast<
          std::tuple<size_t, py::list, py::tuple, std::optional<std::pair<int64_t, uint32_t>>>>(
          item);
      const OptimizerSignature& signature = signatures_.at(kernel);
      const size_t count = options.size();
      TORCH_CHECK(count == signature.options.size(), signature.kernel->name, " takes ",
                  signature.kernel->options);
      Group& group = groups_.emplace_back(Group{{}, params});
      group.options.kernel = kernel;
      for (size_t k = 0; k < count; ++k) {
        if (THPVariable_Check(options[k].ptr())) {
          const Tensor& t = THPVariable_Unpack(options[k].ptr());
          TORCH_CHECK(t.numel() == 1 && t.is_cuda(), signature.kernel->name,
                      ": an option that is a tensor must be one number on a CUDA device");
          group.options.memory.resize(count);
          group.options.memory[k] = t;
        } else {
          group.options.values[k] = py::cast<double>(options[k]);
        }
      }
      if (rounding) {
        group.options.stochastic = true;
        std::tie(group.options.seed, group.options.step) = *rounding;
      }
      wanted += params.size();
    }
    if (hints_.size() != wanted) hints_.assign(wanted, 0);
    looked_ = false;
    std::vector<Apart> given;
    for (const auto& item : apart) given.push_back(py::cast<Apart>(item));
    std::deque<StepOptions> read;  // with what of them is in device memory

    // From here to the end of the kernels no Python code runs, so that borrowed references hold.
    size_t k = 0;
    for (size_t number = 0; number < groups_.size(); ++number) {
      const Group& group = groups_[number];
      PyObject* params = group.params.ptr();
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i, ++k) {
        PyObject* p = PyList_GET_ITEM(params, i);
        multi_tensor_step_.expect(multi_tensor_step_.size() + kAhead);
        switch (collect(group.options, static_cast<uint32_t>(i), p, state.ptr(), hints_[k])) {
          case Found::kMissing:
            missing.emplace_back(number, p);
            break;
          case Found::kOther:
            others.emplace_back(number, p);
            break;
          case Found::kReady:
            break;
        }
      }
    }
    if (!missing.empty() || (!others.empty() && !partial)) {
      const auto list = [](const std::vector<std::pair<size_t, PyObject*>>& found) {
        py::list l;
        for (const auto& [g, p] : found)
          l.append(py::make_tuple(g, py::reinterpret_borrow<py::object>(p)));
        return l;
      };
      return py::make_tuple(list(missing), list(others));
    }
    for (const auto& [number, param, tensors, average] : given) {
      const StepOptions* options = &groups_.at(number).options;
      if (!options->memory.empty()) {
        StepOptions& o = read.emplace_back(*options);
        for (size_t j = 0; j < o.memory.size(); ++j)
          if (o.memory[j].defined()) o.values[j] = o.memory[j].item<double>();
        o.memory.clear();
        options = &o;
      }
      const OptimizerKernel& kernel = *signatures_[options->kernel].kernel;
      TORCH_CHECK(tensors.size() == static_cast<size_t>(2 + kernel.states + kernel.scalar_states),
                  kernel.name, ": ", tensors.size(), " tensors of one parameter");
      const auto impl = [&](int k) {
        TensorImpl* t = tensors[static_cast<size_t>(k)].unsafeGetTensorImpl();
        TORCH_CHECK(is_plain(t), kernel.name, ": tensor ", k,
                    " of one parameter is not an ordinary dense one");
        return t;
      };
      StepTensors of{impl(0), impl(1)};
      for (int k = 0; k < kernel.states; ++k) of.states[k] = impl(2 + k);
      for (int k = 0; k < kernel.scalar_states; ++k)
        of.scalar_states[k] = impl(2 + kernel.states + k);
      if (average) of.average = average->unsafeGetTensorImpl();
      multi_tensor_step_.add(*options, 0, fresh_.count(param.ptr()), of, weight_of(param.ptr()));
    }
    if (check_only) return py::none();
    const auto ownership = multi_tensor_step_.share_interpreter();
    std::optional<Tensor> scale = grad_scale;
    if (max_grad_norm && multi_tensor_step_.size() > 0) {
      const Tensor clip = multi_tensor_step_.clip(grad_scale, *max_grad_norm);
      if (!clip.defined()) return py::bool_(false);
      grad_norm = clip.select(0, 0);
      scale = clip.select(0, 1);
    }
    multi_tensor_step_.run(scale, found_inf, /*moves_versions=*/true);
    ++steps;
    return py::none();
  }
  Tensor grad_norm;   // of the last step with max_grad_norm
  int64_t steps = 0;  // that were taken. An interrupt that comes meanwhile is raised where step()
                      // returns: this tells

 private:
  enum class Found { kReady, kMissing, kOther };
  struct Flag {
    bool& up;
    explicit Flag(bool& flag) : up(flag) { up = true; }
    ~Flag() { up = false; }
  };
  struct Group {
    StepOptions options;
    py::list params;
  };
  struct Keys {  // in a parameter's dictionary
    std::vector<py::object> states, scalar_states;
  };
  using Apart = std::tuple<size_t, py::object, std::vector<Tensor>, std::optional<Tensor>>;

  // Of a parameter in its average.
  double weight_of(PyObject* param) const {
    return started_.count(param) ? 1.0 : ema_weight_.value_or(0);
  }

  Found collect(const StepOptions& options, uint32_t number, PyObject* param, PyObject* state,
                Py_ssize_t& hint) {
    if (!THPVariable_CheckExact(param)) {
      // A subclass may have a `grad` of its own; the class of Parameter hooks and buffers is for
      // Python to look at.
      return Found::kOther;
    }
    TensorImpl* p = THPVariable_Unpack(param).unsafeGetTensorImpl();
    if (!is_plain(p)) return Found::kOther;
    const Tensor& grad = p->grad();
    if (!grad.defined()) return Found::kReady;
    TensorImpl* g = grad.unsafeGetTensorImpl();
    if (!is_plain(g)) return Found::kOther;

    const OptimizerKernel& kernel = *signatures_[options.kernel].kernel;
    const Keys& keys = keys_[options.kernel];
    StepTensors tensors{p, g};
    const bool first = !fresh_.empty() && fresh_.count(param);
    if (kernel.states > 0 || kernel.scalar_states > 0 || ema_weight_) {
      PyObject* own = state_of(state, param, hint);
      if (!own || !PyDict_Check(own) || PyDict_GET_SIZE(own) == 0) return Found::kMissing;
      Py_ssize_t at = 0;
      for (int k = 0; k < kernel.scalar_states; ++k) {
        PyObject* t = value_of(own, keys.scalar_states[static_cast<size_t>(k)].ptr(), at);
        TORCH_CHECK(
            THPVariable_Check(t),
            "API has changed, `state_steps` argument must contain a list of singleton tensors");
        TensorImpl* number = THPVariable_Unpack(t).unsafeGetTensorImpl();
        if (!is_plain(number) || (!number->is_cpu() && number->device() != p->device()))
          return Found::kOther;
        tensors.scalar_states[k] = number;
      }
      for (int k = 0; k < kernel.states; ++k) {
        // Where steps are counted, a state that lacks one is broken; else it may be that there was
        // no need for one so far.
        PyObject* t = value_of(own, keys.states[static_cast<size_t>(k)].ptr(), at,
                               /*optional=*/kernel.scalar_states == 0);
        if (!t || t == Py_None) return Found::kMissing;
        if (!THPVariable_CheckExact(t)) return Found::kOther;
        tensors.states[k] = THPVariable_Unpack(t).unsafeGetTensorImpl();
        if (!is_plain(tensors.states[k])) return Found::kOther;
      }
      if (ema_weight_) {
        PyObject* t = PyDict_GetItemWithError(own, average_key_.ptr());
        if (!t && PyErr_Occurred()) throw py::error_already_set();
        if (!t || t == Py_None) return Found::kMissing;
        if (!THPVariable_CheckExact(t)) return Found::kOther;
        tensors.average = THPVariable_Unpack(t).unsafeGetTensorImpl();
        if (!is_plain(tensors.average)) return Found::kOther;
      }
    }
    // The scalars of a step are made in one place.
    const TensorImpl* count = tensors.scalar_states[0];
    if (!options.memory.empty() && (p->is_cpu() || (count && count->is_cpu())))
      return Found::kOther;
    multi_tensor_step_.add(options, number, first, tensors, weight_of(param));
    return Found::kReady;
  }

  // state[param], without calling the parameter's __hash__ (which is Python): entries are found
  // where they were the last time, or else by walking the dictionary once.
  PyObject* state_of(PyObject* state, PyObject* param, Py_ssize_t& hint) {
    PyObject *key, *value;
    Py_ssize_t at = hint;
    if (PyDict_Next(state, &at, &key, &value) && key == param) return value;
    if (!looked_) {
      positions_.clear();
      for (Py_ssize_t next = 0, here = 0; PyDict_Next(state, &next, &key, &value); here = next)
        positions_.emplace(key, here);
      looked_ = true;
    }
    const auto found = positions_.find(param);
    if (found == positions_.end()) return nullptr;
    hint = at = found->second;
    PyDict_Next(state, &at, &key, &value);
    return value;
  }

  // d[key], which is most often the entry at position `at`. Raises KeyError as Python does, or
  // returns null.
  static PyObject* value_of(PyObject* d, PyObject* wanted, Py_ssize_t& at, bool optional = false) {
    PyObject *key, *value;
    const Py_ssize_t before = at;
    if (PyDict_Next(d, &at, &key, &value) && key == wanted) return value;
    at = before;
    value = PyDict_GetItemWithError(d, wanted);
    if (!value) {
      if (optional && !PyErr_Occurred()) return nullptr;
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, wanted);
      throw py::error_already_set();
    }
    return value;
  }

  const std::vector<OptimizerSignature>& signatures_ = optimizer_signatures();
  MultiTensorStep multi_tensor_step_;
  std::vector<Group> groups_;
  std::vector<Py_ssize_t> hints_;
  std::unordered_map<PyObject*, Py_ssize_t> positions_;
  std::unordered_set<PyObject*> fresh_, started_;
  bool looked_ = false, stepping_ = false;
  py::object average_key_;
  std::optional<double> ema_weight_;
  std::vector<Keys> keys_;  // per kernel
};

}  // namespace

void bind_optimizers(pybind11::module_& m) {
  py::class_<OptimizerStepper>(
      m, "OptimizerStepper",
      "Steps the parameters of an optimizer as they stand in its dictionaries.")
      .def(py::init<>())
      .def("step", &OptimizerStepper::step, py::arg("state"), py::arg("groups"),
           py::arg("grad_scale") = std::nullopt, py::arg("found_inf") = std::nullopt,
           py::arg("fresh") = py::list(), py::arg("started") = py::list(),
           py::arg("apart") = py::list(), py::arg("partial") = false, py::arg("check_only") = false,
           py::arg("ema_weight") = std::nullopt, py::arg("max_grad_norm") = std::nullopt)
      .def_readonly("grad_norm", &OptimizerStepper::grad_norm)
      .def_readonly("steps", &OptimizerStepper::steps);
  // Of every kernel, in the table's order: its name, and the names of its states, of its scalar
  // states and of its options.
  m.def("optimizer_kernels", [] {
    using Names = std::vector<std::string>;
    std::vector<std::tuple<std::string, Names, Names, Names>> kernels;
    for (const OptimizerSignature& s : optimizer_signatures())
      kernels.emplace_back(s.kernel->name, s.states, s.scalar_states, s.options);
    return kernels;
  });
}

}  // namespace fastops
