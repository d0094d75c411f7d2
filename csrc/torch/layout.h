// Memory layouts: what the loops, which walk raw memory, need to be told. Any dense layout is taken
// as it is and kept.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "../kernels/tables.h"

namespace fastops {

// x itself where its memory is non-overlapping and dense (contiguous, channels_last, transposed
// ...), else a copy with the strides that torch gives to results of elementwise ops on x.
at::Tensor dense(const at::Tensor& x);

// x, or a copy, whose memory holds its values: for kernels that are called past the dispatcher,
// where nobody has resolved what torch._neg_view and x.conj().imag leave to be done, or zeros that
// are nowhere.
inline at::Tensor resolved(const at::Tensor& x) {
  return x.is_neg() ? x.resolve_neg() : x._is_zerotensor() ? x.clone() : x;
}

// Ops that write to their first tensor and return nothing, on tensors whose negation is left to be
// done. torch's own fallback for them takes the result off the stack, where there is none, and
// writes into other memory. Called once, when all ops are there.
void resolve_negations_in_place();

// Whether two tensors of one shape have their elements in one order in memory.
bool same_order(const at::Tensor& a, const at::Tensor& b);

// t in the memory order of `like` (dense, of t's shape): t itself, or a copy.
at::Tensor matching(const at::Tensor& t, const at::Tensor& like);

// An uninitialised tensor with the shape, strides, device and dtype of x (which is dense); large
// ones on CPU come from the pool.
at::Tensor output_like(const at::Tensor& x);
// The same with sizes and strides of its own.
at::Tensor output_strided(const at::Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides);
// An uninitialised contiguous tensor where x is.
at::Tensor output_beside(const at::Tensor& x, at::IntArrayRef sizes, at::ScalarType dtype);

// t.to(dtype), without the call where there is nothing to do.
inline at::Tensor as_dtype(const at::Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

// t broadcast to x (which is dense), along x's memory order and no further than it repeats itself
// there: element i of x is beside values[i % period]. Raises what torch raises where t does not
// broadcast to x.
struct Repeated {
  at::Tensor values;
  int64_t period = 0;
};
Repeated repeated(const at::Tensor& t, const at::Tensor& x);

// A dense tensor around dimension `dim`: (outer, n, inner) in memory, with n along `dim`.
struct Rows3 {
  int64_t outer, n, inner;
};
Rows3 around(const at::Tensor& x, int64_t dim);

// The sum over all dimensions but the last: what flows back to a row that was repeated.
at::Tensor sum_to_row(const at::Tensor& t);

// What the rows of x, which is contiguous, add up to, where a kernel leaves the sums of kRowBlock
// rows at a time, reals.
at::Tensor row_blocks_beside(const at::Tensor& x);
at::Tensor sum_of_row_blocks(const at::Tensor& row_blocks, at::ScalarType dtype);
// Whether x is worth that: it has elements, and rows.
inline bool has_rows(const at::Tensor& x) { return x.dim() > 1 && x.numel() > 0; }

// Throws unless `row`, which op calls `what`, is one row of the input's last dimension.
void check_row(const char* op, const char* what, const at::Tensor& row, const at::Tensor& input);
// Throws unless t is of the input's dtype and device.
void check_like(const char* op, const char* what, const at::Tensor& t, const at::Tensor& input);

// Where the elements of a dense tensor, walked in memory order, stand in logical order; nothing
// where that takes more than kMaxDims dimensions.
std::optional<LogicalOrder> logical_order(const at::Tensor& x);

}  // namespace fastops
