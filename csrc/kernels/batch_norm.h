// The batch-norm kind: statistics per channel, and y = activation(normalized x + residual) with its
// gradients. A tensor is seen as (images, channels, positions); in memory the channels are
// innermost where `channels_last`.
#pragma once
#include "kernel_table.h"

namespace fastops {

enum class NormActivation : int {
  kNone,
  kReLU,
  kReLU6,
  kLeakyReLU,
  kSiLU,
  kGELU,
  kHardswish,
  kMish
};

struct BatchNormArgs {
  c10::ScalarType dtype;  // of x, residual, y, dy, dx and dresidual
  int64_t images, channels, positions;
  bool channels_last;
  const void* x;
  // forward: added to the normalized x; or null. backward: the residual, or the output y where
  // `residual_is_output`: enough for the derivative of relu, relu6 and leaky_relu.
  const void* residual;
  bool residual_is_output;
  const void* dy;
  void *y, *dx, *dresidual;  // dresidual may be null
  // Per channel, in real. weight and bias may be null, for 1 and 0.
  const void *mean, *inverse, *weight, *bias;
  NormActivation activation;
  double slope;  // of leaky_relu
  // statistics: the mean and the biased variance. sums: those of dz and of dz (x - mean), where dz
  // is the gradient to the activation's input. backward: reads the latter; null where the
  // statistics are constants.
  void* totals[2];
  void* workspace;  // statistics and sums: batch_norm_workspace() bytes
  void* stream;
};
using BatchNormLauncher = Error (*)(const BatchNormArgs&);
struct BatchNormKernel {
  BatchNormLauncher statistics, forward, sums, backward;
};

// Sums over positions are taken block by block, the positions of a block in a fixed tree; blocks
// never span two images. Chunks of blocks are handed to threads. Shape alone fixes all of that, so
// that results depend neither on threads nor on the memory layout.
constexpr int64_t kNormBlock = 128;
constexpr int64_t norm_blocks(int64_t positions) {
  return (positions + kNormBlock - 1) / kNormBlock;
}
constexpr int64_t norm_blocks_per_chunk(int64_t images, int64_t channels, int64_t positions) {
  const int64_t blocks = images * norm_blocks(positions);
  const int64_t least = 32768 / (kNormBlock * (channels < 1 ? 1 : channels)) + 1;
  const int64_t even = (blocks + 63) / 64;
  return least > even ? least : even;
}
constexpr int64_t norm_chunks(int64_t images, int64_t channels, int64_t positions) {
  const int64_t each = norm_blocks_per_chunk(images, channels, positions);
  return (images * norm_blocks(positions) + each - 1) / each;
}
constexpr int64_t batch_norm_workspace(int64_t images, int64_t channels, int64_t positions) {
  return norm_chunks(images, channels, positions) * channels * 2 * 8;
}

}  // namespace fastops
