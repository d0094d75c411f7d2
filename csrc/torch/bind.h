// What module.cpp calls: each kind adds its functions to the extension module. What a function's
// kernels do not take is handed to torch's function here, for all kinds.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>

#include "backend.h"

namespace fastops {

// Lets other Python threads run while a kernel does, where it takes long enough to be worth the two
// switches.
class Unlocked {
 public:
  template <class... A>
  explicit Unlocked(const at::Tensor& t, const A&...) {
    if (t.defined() && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
        t.numel() >= kWorthwhile)
      released_.emplace();
  }

 private:
  static constexpr int64_t kWorthwhile = 1 << 14;
  std::optional<pybind11::gil_scoped_release> released_;
};

void bind_elementwise(pybind11::module_& m);
void bind_fused(pybind11::module_& m);
void bind_gates(pybind11::module_& m);
void bind_losses(pybind11::module_& m);
void bind_softmax(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_dropout(pybind11::module_& m);
void bind_optimizers(pybind11::module_& m);
void bind_batch_norm(pybind11::module_& m);
void bind_row_norms(pybind11::module_& m);

// What fastops/_core/fallback.py makes of (name, arguments) of a call that was refused;
// NotImplemented where it has nothing better. `knows_only_torch` is asked of calls with tensors
// whose class dispatches in Python: whether it takes no ops but torch's.
void set_fallback(pybind11::function fallback, pybind11::function knows_only_torch);
pybind11::object fallback(const char* name, const pybind11::tuple& arguments);
bool knows_only_torch(const pybind11::tuple& arguments);

template <class... A>
bool any_dispatches_in_python(const A&... a) {
  const auto one = []<class T>(const T& t) {
    if constexpr (std::is_same_v<T, at::Tensor>)
      return t.defined() && t.key_set().has(c10::DispatchKey::Python);
    return false;
  };
  return (one(a) || ...);
}

// Adds f to the module as `name`. Where it raises NotImplementedError (a dtype, a layout, a device
// or a kind of tensor that has no kernels) the call goes to the fallback: that costs a call that is
// not refused nothing.
template <class F, class R, class... A, class... Extra>
void def(pybind11::module_& m, const std::string& name, F f, R (F::*)(A...) const,
         const Extra&... extra) {
  m.def(
      name.c_str(),
      [name = kept(name), f](A... a) -> R {
        const auto fall_back = [&](auto refuse) -> R {
          const pybind11::object result = fallback(name, pybind11::make_tuple(a...));
          if (result.is(pybind11::reinterpret_borrow<pybind11::object>(Py_NotImplemented)))
            refuse();
          return result.cast<R>();
        };
        if (any_dispatches_in_python(a...) && knows_only_torch(pybind11::make_tuple(a...)))
          return fall_back([&] {
            TORCH_CHECK_NOT_IMPLEMENTED(false, name, " has no function of torch to fall back to");
          });
        try {
          const Unlocked unlocked(a...);
          return f(a...);
        } catch (const c10::NotImplementedError&) {
          return fall_back([] { throw; });
        } catch (python_error& error) {  // of a kernel in Python
          error.persist();
          if (!PyErr_GivenExceptionMatches(error.type, PyExc_NotImplementedError)) throw;
          return fall_back([] { throw; });
        } catch (const pybind11::error_already_set& error) {  // of a shape function
          if (!error.matches(PyExc_NotImplementedError)) throw;
          return fall_back([] { throw; });
        }
      },
      extra...);
}
template <class F, class... Extra>
void def(pybind11::module_& m, const std::string& name, F f, const Extra&... extra) {
  def(m, name, f, &F::operator(), extra...);
}
}  // namespace fastops
