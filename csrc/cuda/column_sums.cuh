// Rows that are written and, on the way, added up: a thread goes down a few columns of one strip of
// rows. No formula.
#pragma once
#include "../kernels/column_sums.h"
#include "launch.cuh"
#include "pack.cuh"

namespace fastops::cuda {

// Writes out, rows of `period` elements, and the sums over each kRowBlock of them. column(left)
// returns what computes the `width` elements from column `left` on in any row: of the index of the
// first, and an array to be filled.
template <int width, int threads, class scalar_t, class Column>
__device__ __forceinline__ void for_each_row_block(int64_t rows, int64_t period, scalar_t* out,
                                                   real_of<scalar_t>* sums, Column column) {
  using real = real_of<scalar_t>;
  const int64_t columns = period / width, items = row_blocks_of(rows) * columns;
  for (int64_t k = int64_t{blockIdx.x} * threads + threadIdx.x; k < items;
       k += int64_t{gridDim.x} * threads) {
    const int64_t first = k / columns * kRowBlock, left = k % columns * width;
    const int64_t last = first + kRowBlock < rows ? first + kRowBlock : rows;
    const auto compute = column(left);
    real sum[width] = {};
    for (int64_t i = first * period + left; i < last * period; i += period) {
      real x[width];
      compute(i, x);
#pragma unroll
      for (int m = 0; m < width; ++m) sum[m] += x[m];
      store_columns(out + i, x);
    }
    store_columns(sums + k / columns * period + left, sum);
  }
}

// Threads that for_each_row_block() keeps busy, where `wide` packs of `size` columns.
inline int64_t row_block_items(int64_t rows, int64_t period, bool wide, int size) {
  return row_blocks_of(rows) * (wide ? period / size : period);
}

}  // namespace fastops::cuda
