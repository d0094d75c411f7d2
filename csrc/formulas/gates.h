// Gated linear units: y = forward(a, b) of the two halves of a tensor, and backward(a, b, dy),
// which is {da, db}. Everything else follows by Dual: the tangent, and the derivative of backward.
#pragma once
#include "activations.h"
#include "pair.h"

namespace fastops {

// Dauphin et al., 2017.
struct GLU {
  static constexpr const char* name = "glu";
  template <class T>
  static FASTOPS_FN T forward(T a, T b) {
    return a * sigmoid(b);
  }
  template <class T>
  static FASTOPS_FN Pair<T> backward(T a, T b, T dy) {
    const T s = sigmoid(b);
    return {dy * s, dy * (a * (s * (c<T>(1) - s)))};
  }
};

// Shazeer, 2020, as language models have it: the first half is what silu is taken of.
struct SwiGLU {
  static constexpr const char* name = "swiglu";
  template <class T>
  static FASTOPS_FN T forward(T a, T b) {
    return SiLU::forward(a) * b;
  }
  template <class T>
  static FASTOPS_FN Pair<T> backward(T a, T b, T dy) {
    return {SiLU::backward(a, dy) * b, dy * (a * sigmoid(a))};  // of a quotient a Dual may be NaN
  }
};

// GELU and ReLU in silu's place, from the same paper.
struct GEGLU {
  static constexpr const char* name = "geglu";
  template <class T>
  static FASTOPS_FN T forward(T a, T b) {
    return GELU::forward(a) * b;
  }
  template <class T>
  static FASTOPS_FN Pair<T> backward(T a, T b, T dy) {
    return {GELU::backward(a, dy) * b, dy * GELU::forward(a)};
  }
};
struct GEGLUTanh {
  static constexpr const char* name = "geglu_tanh";
  template <class T>
  static FASTOPS_FN T forward(T a, T b) {
    return GELUTanh::forward(a) * b;
  }
  template <class T>
  static FASTOPS_FN Pair<T> backward(T a, T b, T dy) {
    return {GELUTanh::backward(a, dy) * b, dy * (a * GELUTanh::gate(a))};
  }
};
struct ReGLU {
  static constexpr const char* name = "reglu";
  template <class T>
  static FASTOPS_FN T forward(T a, T b) {
    return ReLU::forward(a) * b;
  }
  template <class T>
  static FASTOPS_FN Pair<T> backward(T a, T b, T dy) {
    return {ReLU::backward(a, dy * b), dy * ReLU::forward(a)};
  }
};

// Along (u, v): f_a u + f_b v.
template <class Op, class T>
FASTOPS_FN T gate_tangent(T a, T b, T u, T v) {
  const Pair<T> slopes = Op::backward(a, b, c<T>(1));
  return slopes.v[0] * u + slopes.v[1] * v;
}
// And the derivatives to a and b of dy times that. The Hessian is symmetric: they are what backward
// changes by along (u, v).
template <class Op, class T>
FASTOPS_FN Pair<T> gate_second(T a, T b, T dy, T u, T v) {
  using D = Dual<T>;
  const Pair<D> slopes = Op::backward(D(a, u), D(b, v), D(dy, c<T>(0)));
  return {slopes.v[0].d, slopes.v[1].d};
}

using Gates = List<GLU, SwiGLU, GEGLU, GEGLUTanh, ReGLU>;

}  // namespace fastops
