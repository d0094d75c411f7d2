// An activation joined to the addition before it: y = forward(x, t), and dx = dt = backward(x, t,
// dy), which an Op that is told by its output leaves to its activation's. `broadcast`: t is one
// row, repeated along x.
#pragma once
#include "activations.h"

namespace fastops {

struct AddReLU {
  static constexpr const char *name = "add_relu", *activation = ReLU::name;
  static constexpr bool broadcast = false;
  template <class T>
  static FASTOPS_FN T forward(T x, T t) {
    return ReLU::forward(x + t);
  }
};

template <class Activation>
struct BiasActivation {
  static constexpr const char* activation = Activation::name;
  static constexpr bool broadcast = true;
  template <class T>
  static FASTOPS_FN T forward(T x, T b) {
    return Activation::forward(x + b);
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T b, T dy) {
    return Activation::backward(x + b, dy);
  }
};
struct BiasGELU : BiasActivation<GELU> {
  static constexpr const char* name = "bias_gelu";
};
struct BiasGELUTanh : BiasActivation<GELUTanh> {
  static constexpr const char* name = "bias_gelu_tanh";
};

using Fused = List<AddReLU, BiasGELU, BiasGELUTanh>;

}  // namespace fastops
