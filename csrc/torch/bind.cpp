#include "bind.h"

#include <deque>

namespace fastops {
namespace {
// Never given up: the interpreter may be gone before this library is.
PyObject* fallback_function = nullptr;
PyObject* knows_only_torch_function = nullptr;
}  // namespace

void set_fallback(pybind11::function fallback, pybind11::function knows_only_torch) {
  fallback_function = fallback.release().ptr();
  knows_only_torch_function = knows_only_torch.release().ptr();
}

pybind11::object fallback(const char* name, const pybind11::tuple& arguments) {
  if (fallback_function == nullptr)
    return pybind11::reinterpret_borrow<pybind11::object>(Py_NotImplemented);
  return pybind11::reinterpret_borrow<pybind11::function>(fallback_function)(name, arguments);
}

bool knows_only_torch(const pybind11::tuple& arguments) {
  if (knows_only_torch_function == nullptr) return false;
  return pybind11::reinterpret_borrow<pybind11::function>(knows_only_torch_function)(arguments)
      .cast<bool>();
}

const char* kept(const std::string& name) {
  static auto* names = new std::deque<std::string>;
  return names->emplace_back(name).c_str();
}

}  // namespace fastops
