// How rows are cut into blocks for sums over them: the same on every back end, so that the bits
// are.
#pragma once
#include "kernel_table.h"

namespace fastops {

// Rows whose sum is taken term by term: that of more would drift where they are alike.
constexpr int64_t kRowBlock = 16;
constexpr int64_t row_blocks_of(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

}  // namespace fastops
