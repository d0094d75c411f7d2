// Dropout. Its random scalars are Philox 4x32-10 keyed by (seed, logical element index), so that
// the mask is the same on every back end, thread count, instruction set and memory layout.
#pragma once
#include "philox.h"
#include "relu.h"

namespace fastops {

// An element is dropped when its word is below threshold = round(p 2^32); p = 1 never reaches a
// kernel.
struct Dropout {
  static constexpr const char* name = "dropout";
  static constexpr int inputs = 1;
  static constexpr bool from_output = false, own_derivative = true;
  template <class T, class Mask>
  static FASTOPS_FN T forward(Mask keep, T scale, T x) {
    return select(keep, x * scale, c<T>(0));
  }
};

struct ReLUDropout {
  static constexpr const char* name = "relu_dropout";
  static constexpr int inputs = 1;
  static constexpr bool from_output = true,
                        own_derivative = false;  // what was dropped is 0, as what was not positive
  template <class T, class Mask>
  static FASTOPS_FN T forward(Mask keep, T scale, T x) {
    return Dropout::forward(keep, scale, ReLU::forward(x));
  }
  template <class T>
  static FASTOPS_FN T backward(T y, T dy, T scale) {
    return ReLU::backward(y, dy * scale);
  }
};

struct BiasDropoutAdd {
  static constexpr const char* name = "bias_dropout_add";
  static constexpr int inputs = 3;  // x, a row that is repeated, and a residual
  static constexpr bool from_output = false, own_derivative = false;
  template <class T, class Mask>
  static FASTOPS_FN T forward(Mask keep, T scale, T x, T bias, T residual) {
    return residual + Dropout::forward(keep, scale, x + bias);
  }
};

using Dropouts = List<Dropout, ReLUDropout, BiasDropoutAdd>;

}  // namespace fastops
