// Elementwise losses: value(x, t), and its derivatives d0 to the input and d1 to the target. The reduction is the
// loop's affair, second derivatives are taken of d0 and d1 by Dual.
#pragma once
#include "../math.h"

namespace fastops {

struct MSE {
  static constexpr const char *name = "mse_loss", *params = "";
  template <class T>
  static FASTOPS_FN T value(T x, T t) {
    return (x - t) * (x - t);
  }
  template <class T>
  static FASTOPS_FN T d0(T x, T t) {
    return c<T>(2) * (x - t);
  }
  template <class T>
  static FASTOPS_FN T d1(T x, T t) {
    return c<T>(2) * (t - x);
  }
};

using Losses = List<MSE>;

}  // namespace fastops
