// Rows that are computed and, on the way, added up by columns, kRowBlock of them at a time. No
// formula.
#pragma once
#include "../kernels/column_sums.h"
#include "parallel.h"
#include "vec_io.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kSummedGrain = 16384;   // elements a thread takes at least
constexpr int64_t kSummedColumns = 4096;  // whose sums stay in the first-level cache
constexpr int64_t kPrefetchVectors = 32;  // ahead

// Of `rows` rows of `period` elements. value(i, j, n, v) makes v of the n elements from i on, which
// are in column j; sums[m] has a row for each block of rows, into which v[m] goes. prefetch(i) is
// called for what is to come: the sums take turns with what a processor would foresee.
template <class L, int quantities, class Value, class Prefetch>
FASTOPS_FN void sum_columns(int64_t rows, int64_t period,
                            typename L::real* const (&sums)[quantities], Value value,
                            Prefetch prefetch, bool streamed) {
  using real = typename L::real;
  using V = typename L::V;
  constexpr int64_t columns = kSummedColumns / quantities;
  const int64_t across = (period + columns - 1) / columns,
                each = kRowBlock * (period < columns ? period : columns);
  cpu::parallel(row_blocks_of(rows) * across, kSummedGrain / each + 1,
                [=](int64_t begin, int64_t end) {
                  for (int64_t k = begin; k < end; ++k) {
                    const int64_t block = k / across, left = k % across * columns,
                                  right = left + columns < period ? left + columns : period;
                    const int64_t first = block * kRowBlock,
                                  last = first + kRowBlock < rows ? first + kRowBlock : rows;
                    alignas(64) real sum[quantities][columns];
                    for (int m = 0; m < quantities; ++m)
                      for (int64_t j = 0; j < right - left; ++j) sum[m][j] = 0;
                    for (int64_t row = first * period; row < last * period; row += period) {
                      for_each_vector<L::size>(left, right, [&](int64_t j, auto n) {
                        V v[quantities][L::count];
                        prefetch(row + j + kPrefetchVectors * L::size);
                        value(row + j, j, n, v);
                        for (int m = 0; m < quantities; ++m)
                          add_real<L>(sum[m] + (j - left), n, v[m]);
                      });
                    }
                    for (int m = 0; m < quantities; ++m)
                      for (int64_t j = left; j < right; ++j)
                        sums[m][block * period + j] = sum[m][j - left];
                  }
                  if (streamed) fence();
                });
}

}  // namespace
}  // namespace fastops::CPU_CAPABILITY
