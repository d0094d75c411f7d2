#include "layout.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/sum.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>

#include "backend.h"
#include "pool.h"
#include "reduction.h"

namespace fastops {

namespace {
void resolve_and_write_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t n = op.schema().arguments().size();
  at::Tensor given, work;
  for (size_t k = 0; k < n; ++k) {
    c10::IValue& argument = *(stack->end() - static_cast<std::ptrdiff_t>(n - k));
    if (!argument.isTensor() || !argument.toTensor().defined() || !argument.toTensor().is_neg())
      continue;
    const at::Tensor t = argument.toTensor();
    argument = t.resolve_neg();
    if (k == 0) given = t, work = argument.toTensor();
  }
  op.callBoxed(stack);
  if (given.defined()) given.copy_(work);
}
}  // namespace

void resolve_negations_in_place() {
  static torch::Library library(torch::Library::IMPL, "fastops", c10::DispatchKey::Negative,
                                __FILE__, __LINE__);
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind("fastops::", 0) != 0 || name.name.back() != '_') continue;
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (!op || !op->schema().returns().empty() ||
        op->schema().arguments()[0].type()->kind() != c10::TypeKind::TensorType)
      continue;
    library.impl(name.name.c_str(),
                 torch::CppFunction::makeFromBoxedFunction<&resolve_and_write_back>());
  }
}

namespace {
c10::Allocator* allocator_of(size_t nbytes) {
  return pool_serves(nbytes) ? pool_allocator() : c10::GetCPUAllocator();
}

// What torch.empty_strided would make, without its way through the dispatcher, which is a tenth of
// a small op; large ones come from the pool.
at::Tensor on_cpu(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype,
                  size_t nbytes) {
  return at::Tensor(at::detail::empty_strided_generic(
      sizes, strides, allocator_of(nbytes), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype));
}
}  // namespace

at::Tensor dense(const at::Tensor& x) {
  if (x.is_non_overlapping_and_dense()) return x;
  if (!x.is_cpu()) return at::empty_like(x).copy_(x);
  return on_cpu(x.sizes(), at::infer_dense_strides(x.sizes(), x.strides()), x.scalar_type(),
                x.nbytes())
      .copy_(x);
}

at::Tensor output_like(const at::Tensor& x) {
  if (!x.is_cpu()) return at::empty_like(x);
  return on_cpu(x.sizes(), x.strides(), x.scalar_type(), x.nbytes());
}

at::Tensor output_beside(const at::Tensor& x, at::IntArrayRef sizes, at::ScalarType dtype) {
  if (!x.is_cpu()) return at::empty(sizes, x.options().dtype(dtype));
  c10::Allocator* allocator = allocator_of(c10::multiply_integers(sizes) * c10::elementSize(dtype));
  return at::Tensor(at::detail::empty_generic(
      sizes, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt));
}

at::Tensor output_strided(const at::Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides) {
  if (!x.is_cpu()) return at::empty_strided(sizes, strides, x.options());
  return on_cpu(sizes, strides, x.scalar_type(), c10::multiply_integers(sizes) * x.element_size());
}

bool same_order(const at::Tensor& a, const at::Tensor& b) {
  const auto sizes = a.sizes(), s = a.strides(), t = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && s[d] != t[d]) return false;
  return true;
}

at::Tensor matching(const at::Tensor& t, const at::Tensor& like) {
  if (t.numel() == 0 || same_order(t, like)) return t;
  if (!t.is_cpu()) return at::empty_strided(like.sizes(), like.strides(), t.options()).copy_(t);
  return on_cpu(like.sizes(), like.strides(), t.scalar_type(), t.nbytes()).copy_(t);
}

Repeated repeated(const at::Tensor& t, const at::Tensor& x) {
  constexpr int64_t kShort = 512,
                    kPack = 8;  // a shorter row is repeated, into whole packs, for the loops' sake
  at::Tensor w = t.expand(x.sizes());
  if (x.numel() == 0) return {w, 0};
  std::vector<int64_t> order(x.dim());
  for (size_t d = 0; d < order.size(); ++d) order[d] = static_cast<int64_t>(d);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return (x.size(a) == 1) != (x.size(b) == 1) ? x.size(a) == 1 : x.stride(a) > x.stride(b);
  });
  w = w.permute(order);
  while (w.dim() > 0 && (w.size(0) == 1 || w.stride(0) == 0)) w = w.select(0, 0);
  w = w.contiguous().reshape({-1});
  const int64_t period = w.numel(), n = std::min(kShort, x.numel());
  if (period >= n) return {w, period};
  const int64_t times = ((n + period - 1) / period + kPack - 1) / kPack * kPack;
  return {w.expand({times, period}).contiguous().reshape({-1}), times * period};
}

Rows3 around(const at::Tensor& x, int64_t dim) {
  if (x.dim() == 0) return {1, 1, 1};
  const int64_t n = x.size(dim), numel = x.numel();
  if (numel == 0) return {0, n, 1};
  // A dimension of size 1 may carry any stride; what lies inside it is then told by nothing, and
  // nothing depends on it.
  const int64_t inner = n == 1 ? 1 : x.stride(dim);
  return {numel / (n * inner), n, inner};
}

std::optional<LogicalOrder> logical_order(const at::Tensor& x) {
  LogicalOrder order{1, {x.numel()}, {1}};
  if (x.is_contiguous() || x.numel() == 0) return order;
  struct Dim {
    int64_t size, stride, logical;
  };
  c10::SmallVector<Dim, 8> dims;
  int64_t logical = 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (x.size(d) != 1) dims.push_back({x.size(d), x.stride(d), logical});
    logical *= x.size(d);
  }
  std::sort(dims.begin(), dims.end(),
            [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  // Neighbours in memory that are neighbours in logical order too are one dimension.
  c10::SmallVector<Dim, 8> merged;
  for (const Dim& d : dims) {
    if (!merged.empty() && merged.back().logical == d.logical * d.size) {
      merged.back() = {merged.back().size * d.size, d.stride, d.logical};
    } else {
      merged.push_back(d);
    }
  }
  if (merged.size() > kMaxDims) return std::nullopt;
  order.dims = static_cast<int>(merged.size());
  for (size_t k = 0; k < merged.size(); ++k) {
    order.size[k] = merged[k].size;
    order.logical_stride[k] = merged[k].logical;
  }
  return order;
}

at::Tensor sum_to_row(const at::Tensor& t) {
  if (t.dim() <= 1) return t.clone();  // it may be a result beside t, and cannot be t itself
  std::vector<int64_t> leading(t.dim() - 1);
  for (size_t d = 0; d < leading.size(); ++d) leading[d] = static_cast<int64_t>(d);
  return t.sum(leading);
}

at::Tensor row_blocks_beside(const at::Tensor& x) {
  const int64_t period = x.size(-1);
  return output_beside(x, {row_blocks_of(x.numel() / period), period}, real_of(x.scalar_type()));
}

at::Tensor sum_of_row_blocks(const at::Tensor& row_blocks, at::ScalarType dtype) {
  // torch would cut the sum to a single number at the threads' borders.
  const bool single = row_blocks.size(1) == 1;
  return as_dtype(single ? sum_of(row_blocks, 1, at::Tensor()).reshape({1}) : row_blocks.sum(0),
                  dtype);
}

void check_row(const char* op, const char* what, const at::Tensor& row, const at::Tensor& input) {
  TORCH_CHECK(input.dim() >= 1 && row.dim() == 1 && row.size(0) == input.size(-1), op,
              ": expected a ", what, " of as many elements as the input's last dimension has, got ",
              row.sizes(), " for an input of ", input.sizes());
}

void check_like(const char* op, const char* what, const at::Tensor& t, const at::Tensor& input) {
  TORCH_CHECK(t.scalar_type() == input.scalar_type() && t.device() == input.device(), op,
              ": expected a ", what, " of the input's dtype and device, ", input.scalar_type(),
              " on ", input.device(), ", got ", t.scalar_type(), " on ", t.device());
}

}  // namespace fastops
