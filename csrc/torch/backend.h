// Which kernels run: the tables of a device, its stream, and errors on their way up.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <string>

#include "../kernels/tables.h"

namespace fastops {

// The tables of the CPU's best instruction set (at::get_cpu_capability(), so ATEN_CPU_CAPABILITY
// counts) or of CUDA. Raises NotImplementedError for a device that has none.
const Tables& tables(c10::DeviceType device);

// "DEFAULT", "AVX2" or "AVX512": what tables(CPU) is made of.
const char* cpu_capability();
bool cuda_built();

// The current stream of the tensor's device, null on CPU.
void* stream_of(const at::Tensor& t);

// A copy of the name that lives as long as the module.
const char* kept(const std::string& name);

inline void check(const char* op, Error error) { TORCH_CHECK(error == nullptr, op, ": ", error); }

// Raises NotImplementedError, as torch's own kernels do, for what is not float64, float32, bfloat16
// or float16.
void check_dtype(const char* op, const at::Tensor& t);

// float64 for float64, else float32: what a kernel computes in.
inline c10::ScalarType real_of(c10::ScalarType dtype) {
  return dtype == c10::ScalarType::Double ? dtype : c10::ScalarType::Float;
}

}  // namespace fastops
