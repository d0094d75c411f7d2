// Which ops torch's autocast runs in float32: its own lists, which differ by device, are asked.
#pragma once
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace fastops {

constexpr c10::DispatchKey kAutocastKeys[] = {c10::DispatchKey::AutocastCPU,
                                              c10::DispatchKey::AutocastCUDA};

// Whether aten::name has a rule on the device of `key`. Those of the functions that we have
// kernels for all cast to float32.
inline bool has_autocast_rule(c10::DispatchKey key, const std::string& name,
                              const char* overload = "") {
  const auto op = c10::Dispatcher::singleton().findSchema({"aten::" + name, overload});
  return op && op->hasKernelForDispatchKey(key);
}

// Calls f with `input` in float32, unless it is float64, and with autocast out of the way.
template <class F>
auto in_float32(c10::DispatchKey key, const at::Tensor& input, F f) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto device = key == c10::DispatchKey::AutocastCPU ? c10::kCPU : c10::kCUDA;
  return f(at::autocast::cached_cast(at::kFloat, input, device));
}

}  // namespace fastops
