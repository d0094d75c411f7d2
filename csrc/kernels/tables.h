// The seam. Above it: torch, schemas, shapes, gradients. Below it: loops over raw memory. A back
// end is a few constant tables of kernels, one per kind; nothing above the seam knows a formula,
// nothing below it knows a tensor. No code runs at load.
#pragma once
#include "batch_norm.h"
#include "cross_entropy.h"
#include "dropout.h"
#include "elementwise.h"
#include "gradient_norm.h"
#include "loss.h"
#include "optimizer.h"
#include "row_norm.h"
#include "softmax.h"

namespace fastops {

struct Tables {
  KernelTable<ElementwiseKernel> elementwise;
  KernelTable<FusedKernel> fused;
  KernelTable<GateKernel> gate;
  KernelTable<LossKernel> loss;  // the last is "sum": value(x) = x over reals
  KernelTable<SoftmaxKernel> softmax;
  KernelTable<CrossEntropyKernel> cross_entropy;
  KernelTable<DropoutKernel> dropout;
  KernelTable<OptimizerKernel> optimizer;
  GradientNormKernel gradient_norm;
  BatchNormKernel batch_norm;  // all null where there is none
  RowNormKernel row_norm;      // the same
};

#define FASTOPS_TABLES(back_end)                                                             \
  namespace back_end {                                                                       \
  extern const KernelTable<ElementwiseKernel> elementwise_kernels;                           \
  extern const KernelTable<FusedKernel> fused_kernels;                                       \
  extern const KernelTable<GateKernel> gate_kernels;                                         \
  extern const KernelTable<LossKernel> loss_kernels;                                         \
  extern const KernelTable<SoftmaxKernel> softmax_kernels;                                   \
  extern const KernelTable<CrossEntropyKernel> cross_entropy_kernels;                        \
  extern const KernelTable<DropoutKernel> dropout_kernels;                                   \
  extern const KernelTable<OptimizerKernel> optimizer_kernels;                               \
  extern const GradientNormKernel gradient_norm_kernel;                                      \
  extern const BatchNormKernel batch_norm_kernel;                                            \
  extern const RowNormKernel row_norm_kernel;                                                \
  inline Tables tables() {                                                                   \
    return {elementwise_kernels,  fused_kernels,         gate_kernels,    loss_kernels,      \
            softmax_kernels,      cross_entropy_kernels, dropout_kernels, optimizer_kernels, \
            gradient_norm_kernel, batch_norm_kernel,     row_norm_kernel};                   \
  }                                                                                          \
  }
FASTOPS_TABLES(DEFAULT)
FASTOPS_TABLES(AVX2)
FASTOPS_TABLES(AVX512)
FASTOPS_TABLES(cuda)
#undef FASTOPS_TABLES

}  // namespace fastops
