// The extension module fastops._C: the functions of every kind, the tables as data, and the pool's
// switches.
#include <pybind11/stl.h>

#include "backend.h"
#include "bind.h"
#include "layout.h"
#include "pool.h"
#include "register.h"

namespace py = pybind11;

// fastops/_abi.py finds this in the file, where the extension does not load.
extern "C" __attribute__((used, visibility("default"))) const char fastops_built_for[] =
    "fastops built for torch " FASTOPS_TORCH_VERSION "\n";

TORCH_LIBRARY_FRAGMENT(fastops, m) {
  using namespace fastops;
  register_elementwise(m);
  register_fused(m);
  register_gates(m);
  register_losses(m);
  register_softmax(m);
  register_cross_entropy(m);
  register_dropout(m);
  register_batch_norm(m);
  register_row_norms(m);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fastops;
  m.doc() = "Kernels of fastops. Use fastops.functional, fastops.nn and fastops.optim.";
  bind_elementwise(m);
  bind_fused(m);
  bind_gates(m);
  bind_losses(m);
  bind_softmax(m);
  bind_cross_entropy(m);
  bind_dropout(m);
  bind_optimizers(m);
  bind_batch_norm(m);
  bind_row_norms(m);
  resolve_negations_in_place();

  m.def("set_fallback", &set_fallback);
  m.def("cpu_capability", [] { return std::string(cpu_capability()); });
  m.def("cuda_built", &cuda_built);
  m.def("torch_version", [] { return std::string(FASTOPS_TORCH_VERSION); });

  // (kind, name, params) of every kernel
  m.def("kernels", [] {
    std::vector<std::tuple<std::string, std::string, std::string>> kernels;
    const Tables& t = tables(c10::DeviceType::CPU);
    for (const auto& r : t.elementwise) kernels.emplace_back("elementwise", r.name, r.params);
    for (const auto& r : t.fused) kernels.emplace_back("fused", r.name, r.broadcast ? "bias" : "");
    for (const auto& r : t.gate) {
      kernels.emplace_back("gate", r.name, "");
      kernels.emplace_back("gate", std::string(r.name) + "_packed", "");
    }
    for (const auto& r : t.loss) kernels.emplace_back("loss", r.name, r.params);
    for (const auto& r : t.softmax) kernels.emplace_back("softmax", r.name, "");
    for (const auto& r : t.cross_entropy) kernels.emplace_back("cross_entropy", r.name, "");
    for (const auto& r : t.dropout) kernels.emplace_back("dropout", r.name, "");
    for (const auto& r : t.optimizer) kernels.emplace_back("optimizer", r.name, "");
    return kernels;
  });

  m.def("pool_info", [] {
    const PoolInfo i = pool_info();
    py::dict d;
    d["enabled"] = i.enabled;
    d["serves_torch"] = i.serves_torch;
    d["limit"] = i.limit;
    d["cached"] = i.cached;
    d["in_use"] = i.in_use;
    d["peak"] = i.peak;
    d["hits"] = i.hits;
    d["misses"] = i.misses;
    return d;
  });
  m.def("pool_set_limit", &pool_set_limit);
  m.def("pool_trim", &pool_trim);
  m.def("pool_enable", &pool_enable);
  m.def("pool_serve_torch", &pool_serve_torch);
  m.def("pool_stop_serving", &pool_stop_serving);
  m.def("pool_read_limits_below", &pool_read_limits_below);
}
