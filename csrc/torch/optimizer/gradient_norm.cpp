#include "gradient_norm.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <pybind11/gil.h>

#include "../backend.h"

namespace fastops {

using at::Tensor;

void GradientNorm::clear() {
  for (Bucket& b : buckets_) b.tensors.clear();
  chunks_ = 0;
}

void GradientNorm::add(c10::ScalarType dtype, int64_t n, const void* data) {
  Bucket* bucket = nullptr;
  for (Bucket& b : buckets_)
    if (b.dtype == dtype) bucket = &b;
  if (!bucket) bucket = &buckets_.emplace_back(Bucket{dtype, {}});
  bucket->tensors.push_back({n, data});
  chunks_ += gradient_norm_chunks(n);
}

Tensor GradientNorm::clip(c10::Device device, const std::optional<Tensor>& grad_scale,
                          double max_norm, bool release_interpreter) {
  const c10::DeviceGuard guard(device);
  const Tensor made = at::empty({2}, at::dtype(at::kFloat).device(device));
  const Tensor scale = grad_scale ? grad_scale->to(at::kFloat) : Tensor();
  Tensor on_device;
  double* sums = nullptr;
  if (device.is_cpu()) {
    sums_.resize(static_cast<size_t>(chunks_));
    sums = sums_.data();
  } else {
    on_device = at::empty({chunks_}, at::dtype(at::kDouble).device(device));
    sums = on_device.mutable_data_ptr<double>();
  }
  std::optional<pybind11::gil_scoped_release> released;
  if (release_interpreter) released.emplace();
  const GradientNormKernel& kernel = tables(device.type()).gradient_norm;
  void* const stream = stream_of(made);
  double* next = sums;
  for (const Bucket& b : buckets_) {
    check("grad_norm",
          kernel.sums({b.dtype, static_cast<int64_t>(b.tensors.size()), b.tensors.data(), stream},
                      next));
    for (const GradientTensor& t : b.tensors) next += gradient_norm_chunks(t.n);
  }
  float* const out = made.mutable_data_ptr<float>();
  check("grad_norm",
        kernel.clip({chunks_, sums, scale.defined() ? scale.const_data_ptr<float>() : nullptr,
                     max_norm, out, out + 1, stream}));
  return made;
}

}  // namespace fastops
