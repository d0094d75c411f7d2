// What an optimizer's step asks of tensors. It holds them by their implementations, since counting
// references to thousands of them would cost more than a small step.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastops {

// Whether a tensor's memory is its own, and a device's that has kernels. Subclasses with a say in
// dispatch, wrappers of torch.func and fake tensors are not plain.
inline bool is_plain(const c10::TensorImpl* t) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kWrapped = c10::DispatchKeySet(
      {DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::FuncTorchBatched,
       DispatchKey::FuncTorchGradWrapper, DispatchKey::Batched, DispatchKey::NestedTensor});
  const c10::DispatchKeySet keys = t->key_set();
  return keys.has(DispatchKey::Dense) && !keys.has_any(kWrapped) && (t->is_cpu() || t->is_cuda()) &&
         t->unsafe_storage();
}

// Whether the values are not what the memory says until they are resolved.
inline bool is_lazy(const c10::TensorImpl* t) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kLazy =
      c10::DispatchKeySet({DispatchKey::Conjugate, DispatchKey::Negative, DispatchKey::ZeroTensor});
  return t->key_set().has_any(kLazy);
}

inline at::Tensor tensor_of(c10::TensorImpl* t) {
  return at::Tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(t));
}

inline c10::ScalarType dtype_of(const c10::TensorImpl* t) {
  return c10::typeMetaToScalarType(t->dtype());
}

// Whether element i in memory of one is element i in memory of the other; `a` is dense.
inline bool same_memory_order(const c10::TensorImpl* a, const c10::TensorImpl* b) {
  if (a->is_contiguous() && b->is_contiguous()) return true;
  const auto sizes = a->sizes(), sa = a->strides(), sb = b->strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sa[d] != sb[d] && sizes[d] != 1) return false;
  return true;
}

// Bytes from the first element to the end of the last.
inline int64_t extent(const c10::TensorImpl* t) {
  if (t->numel() == 0) return 0;
  int64_t last = 0;
  if (t->is_non_overlapping_and_dense()) {
    last = t->numel() - 1;
  } else {
    for (int64_t d = 0; d < t->dim(); ++d) last += (t->size(d) - 1) * t->stride(d);
  }
  return (last + 1) * static_cast<int64_t>(t->itemsize());
}

// Asks for the cache lines of a tensor that is looked at soon. `t` may be long gone: it is a guess.
inline void prefetch(const c10::TensorImpl* t) {
  const char* lines = reinterpret_cast<const char*>(t);
  for (size_t at = 0; at < sizeof(c10::TensorImpl); at += 64) __builtin_prefetch(lines + at, 0, 2);
}

}  // namespace fastops
