// Which kernels run. The only file that includes CUDA's runtime interface.
#include "backend.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include "../cpu/parallel.h"
#ifdef FASTOPS_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace fastops {

namespace {
struct Cpu {
  const char* name;
  Tables tables;
};
const Cpu& best_cpu() {
  static const Cpu chosen = []() -> Cpu {
    [[maybe_unused]] const std::string best = at::get_cpu_capability();
#ifdef FASTOPS_AVX512
    if (best == "AVX512") return {"AVX512", AVX512::tables()};
#endif
#ifdef FASTOPS_AVX2
    if (best == "AVX512" || best == "AVX2") return {"AVX2", AVX2::tables()};
#endif
    return {"DEFAULT", DEFAULT::tables()};
  }();
  return chosen;
}
}  // namespace

const Tables& tables(c10::DeviceType device) {
  if (device == c10::DeviceType::CPU) return best_cpu().tables;
#ifdef FASTOPS_CUDA
  if (device == c10::DeviceType::CUDA) {
    static const Tables chosen = cuda::tables();
    return chosen;
  }
#endif
  TORCH_CHECK_NOT_IMPLEMENTED(false, "fastops: no kernels for ", c10::DeviceTypeName(device, true),
                              " tensors in this build (see `python -m fastops doctor`)");
}

const char* cpu_capability() { return best_cpu().name; }

bool cuda_built() {
#ifdef FASTOPS_CUDA
  return true;
#else
  return false;
#endif
}

void* stream_of([[maybe_unused]] const at::Tensor& t) {
#ifdef FASTOPS_CUDA
  if (t.is_cuda()) return c10::cuda::getCurrentCUDAStream(t.device().index()).stream();
#endif
  return nullptr;
}

void check_dtype(const char* op, const at::Tensor& t) {
  const auto dtype = t.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      "\"", op, "\" not implemented for '", c10::toString(dtype),
      "': give it a float64, float32, bfloat16 or float16 tensor");
}

namespace cpu {
void parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}
}  // namespace cpu

}  // namespace fastops
