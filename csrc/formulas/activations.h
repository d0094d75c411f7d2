// Activations: y = forward(x), and dx = backward(s, dy) with s the input, or the output where `from_output`.
// Parameters follow as values of T, in the order that `params` declares. No loop, no dtype, no second derivative.
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
    return select(y > c<T>(0), dy, c<T>(0));
  }
};

// x Phi(x), with Phi the normal distribution's cumulative distribution function (Hendrycks and Gimpel, 2016).
struct GELU {
  static constexpr const char *name = "gelu", *params = "";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T cdf(T x) {
    return c<T>(0.5) + c<T>(0.5) * erf(x * c<T>(0.7071067811865476));
  }
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return x * cdf(x);
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy) {
    const T pdf = c<T>(0.3989422804014327) * exp(x * x * c<T>(-0.5));
    return dy * (cdf(x) + x * pdf);
  }
};

struct GELUTanh {
  static constexpr const char *name = "gelu_tanh", *params = "";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T tanh_inner(T x) {
    return tanh(c<T>(0.7978845608028654) * (x + c<T>(0.044715) * x * x * x));
  }
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return c<T>(0.5) * x * (c<T>(1) + tanh_inner(x));
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy) {
    const T t = tanh_inner(x);
    const T slope = c<T>(0.7978845608028654) * (c<T>(1) + c<T>(3 * 0.044715) * x * x);
    return dy * c<T>(0.5) * (c<T>(1) + t + x * (c<T>(1) - t * t) * slope);
  }
};

using Activations = List<ReLU, GELU, GELUTanh>;

}  // namespace fastops
