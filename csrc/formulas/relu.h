// The activation that other kinds are fused with, apart from the rest so that an edit there leaves
// those alone.
#pragma once
#include "../math.h"

namespace fastops {

struct ReLU {
  static constexpr const char *name = "relu", *params = "";
  static constexpr bool from_output = true;
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return select(x <= c<T>(0), c<T>(0), x);  // so, and not by max: a NaN passes
  }
  template <class T>
  static FASTOPS_FN T backward(T y, T dy) {
    return select(y <= c<T>(0), c<T>(0), dy);
  }
};

}  // namespace fastops
