// The row-norm kind: layer norm and RMS norm of contiguous rows, alone or of a sum of two tensors,
// with their gradients.
#pragma once
#include "column_sums.h"
#include "kernel_table.h"

namespace fastops {

struct RowNormArgs {
  c10::ScalarType dtype;  // of x, residual, sum, y, dy, dsum and dx
  int64_t rows, n;
  bool centered;  // whether the mean is subtracted: layer norm; else RMS norm
  double eps;
  const void *weight, *bias;  // n reals, or null for 1 and 0
  const void* x;              // backward: what was normalized
  const void* residual;       // forward: added to x; or null
  void *sum, *y;              // sum: x + residual, rounded; what is normalized
  void *mean, *inverse;       // a real for each row; mean is null where it is not subtracted
  const void *dy, *dsum;      // dsum: the gradient to the sum itself, or null
  void* dx;                   // may be null
  void *dweight, *dbias;      // n reals, may be null
  void* workspace;            // backward: row_norm_workspace() bytes
  void* stream;
};
using RowNormLauncher = Error (*)(const RowNormArgs&);
struct RowNormKernel {
  RowNormLauncher forward, backward;
};

// Sums over rows are taken block by block, the blocks of a chunk one after the other, and then
// chunk by chunk. Chunks are handed to threads. Shape alone fixes all of that. Of few and long rows
// a chunk is less than a block.
constexpr int64_t row_norm_rows_per_chunk(int64_t rows, int64_t n) {
  if (n >= 16384 && rows < 16 * kRowBlock) return (rows + 15) / 16;
  return (row_blocks_of(rows) + 63) / 64 * kRowBlock;
}
constexpr int64_t row_norm_chunks(int64_t rows, int64_t n) {
  const int64_t each = row_norm_rows_per_chunk(rows, n);
  return (rows + each - 1) / each;
}
// `quantities`: the number of dweight and dbias.
constexpr int64_t row_norm_workspace(int64_t rows, int64_t n, int64_t quantities) {
  return row_norm_chunks(rows, n) * quantities * n * 8;
}

}  // namespace fastops
