// Rows that are written and, on the way, summed by columns: one quantity or several, in blocks of
// rows that are the same on every back end. No formula.
#pragma once
#include <array>

#include "../kernels/column_sums.h"
#include "launch.cuh"
#include "pack.cuh"

namespace fastops::cuda {

constexpr int kSummedThreads = 256;
constexpr int kRowsInFlight = 4;  // whose loads are issued before the first is needed

// What is summed, F, has
//   quantities            how many sums there are of a column
//   Rows<scalar_t>        where its rows are: a parameter of the kernel
//   Column<scalar_t, n>   made by a thread of (Rows, index of the first of n columns), with
//     identity(q)         optional: where quantity q starts, 0 if not said
//     load(i)             what it needs of the row that has its columns at index i
//     apply(loaded, i, sums[quantities][n])   writes the row, and adds to the sums what it is to
// How it adds is its own affair: any associative operation will do.

// A thread goes down n columns of a block of rows. sums[q] has a row of `period` for each block.
template <class F, int n, class scalar_t>
__global__ void __launch_bounds__(kSummedThreads, kResident)
    summed_kernel(int64_t rows, int64_t period, typename F::template Rows<scalar_t> of,
                  std::array<real_of<scalar_t>*, F::quantities> sums) {
  using real = real_of<scalar_t>;
  using Column = typename F::template Column<scalar_t, n>;
  const int64_t columns = n == 1 ? period : quotient(period, n);
  const int64_t items = row_blocks_of(rows) * columns;
  for (int64_t item = int64_t{blockIdx.x} * kSummedThreads + threadIdx.x; item < items;
       item += int64_t{gridDim.x} * kSummedThreads) {
    const int64_t block = quotient(item, columns), left = (item - block * columns) * n;
    const int64_t first = block * kRowBlock;
    const int count = static_cast<int>(rows - first < kRowBlock ? rows - first : kRowBlock);
    const Column column(of, left);
    real sum[F::quantities][n];
#pragma unroll
    for (int q = 0; q < F::quantities; ++q) {
      real start = 0;
      if constexpr (requires { Column::identity(q); }) start = Column::identity(q);
#pragma unroll
      for (int k = 0; k < n; ++k) sum[q][k] = start;
    }
    int64_t i = first * period + left;
    int row = 0;
    for (; row + kRowsInFlight <= count; row += kRowsInFlight, i += kRowsInFlight * period) {
      typename Column::Loaded loaded[kRowsInFlight];
#pragma unroll
      for (int m = 0; m < kRowsInFlight; ++m) loaded[m] = column.load(i + m * period);
#pragma unroll
      for (int m = 0; m < kRowsInFlight; ++m) column.apply(loaded[m], i + m * period, sum);
    }
    for (; row < count; ++row, i += period) column.apply(column.load(i), i, sum);
#pragma unroll
    for (int q = 0; q < F::quantities; ++q) store_columns(sums[q] + block * period + left, sum[q]);
  }
}

// Rows of `period` among n elements. `wide`: they may be read and written in packs.
template <class F, int group, class scalar_t>
Error launch_summed(int64_t n, int64_t period, bool wide,
                    const typename F::template Rows<scalar_t>& of,
                    const std::array<real_of<scalar_t>*, F::quantities>& sums, void* stream) {
  if (n == 0) return nullptr;
  const int64_t rows = n / period;
  wide = wide && period % group == 0;
  for (const auto* sum : sums) wide = wide && aligned(sum);
  const int64_t items = row_blocks_of(rows) * (wide ? period / group : period);
  return launch(wide ? summed_kernel<F, group, scalar_t> : summed_kernel<F, 1, scalar_t>,
                grid_for(items, kSummedThreads), kSummedThreads, stream, rows, period, of, sums);
}

}  // namespace fastops::cuda
