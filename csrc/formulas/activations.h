// Activations, alone and of a sum. y = forward(x), and dx = backward(s, dy) with s the input, or
// the output where `from_output`: only where torch saves the output too, so that an in-place op
// that may follow in torch may follow here. Parameters follow as values of T, in the order that
// `params` declares. No loop, no dtype, no second derivative.
//
// output_will_do(parameters): whether backward finds in the output what it finds in the input. Then
// the op keeps no copy in place, where torch does not either.
#pragma once
#include "relu.h"

namespace fastops {

struct ReLU6 {
  static constexpr const char *name = "relu6", *params = "";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return select(x <= c<T>(0), c<T>(0), select(x >= c<T>(6), c<T>(6), x));
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy) {
    return select(x <= c<T>(0), c<T>(0), select(x >= c<T>(6), c<T>(0), dy));
  }
};

struct Hardtanh {
  static constexpr const char *name = "hardtanh", *params = "float min_val=-1.0, float max_val=1.0";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x, T low, T high) {
    return select(x <= low, low, select(x >= high, high, x));
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy, T low, T high) {
    return select(x <= low, c<T>(0), select(x >= high, c<T>(0), dy));
  }
};

struct LeakyReLU {
  static constexpr const char *name = "leaky_relu", *params = "float negative_slope=0.01";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x, T slope) {
    return select(x > c<T>(0), x, x * slope);
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy, T slope) {
    return select(x > c<T>(0), dy, dy * slope);
  }
  static bool output_will_do(double slope) { return slope >= 0; }
};

// Clevert et al., 2016.
struct ELU {
  static constexpr const char *name = "elu", *params = "float alpha=1.0";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x, T alpha) {
    return select(x > c<T>(0), x, alpha * expm1(x));
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy, T alpha) {
    return select(x > c<T>(0), dy, dy * (alpha * exp(x)));  // dy alpha may overflow
  }
};

// ELU with the scale and alpha that keep zero mean and unit variance (Klambauer et al., 2017).
struct SELU {
  static constexpr const char *name = "selu", *params = "";
  static constexpr bool from_output = false;
  static constexpr double kScale = 1.0507009873554804934193349852946,
                          kAlpha = 1.6732632423543772848170429916717;
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return c<T>(kScale) * ELU::forward(x, c<T>(kAlpha));
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy) {
    return c<T>(kScale) * ELU::backward(x, dy, c<T>(kAlpha));
  }
};

// ELU whose slope at 0 is 1 for every alpha (Barron, 2017).
struct CELU {
  static constexpr const char *name = "celu", *params = "float alpha=1.0";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x, T alpha) {
    return select(x > c<T>(0), x, alpha * expm1(x / alpha));
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy, T alpha) {
    return select(x > c<T>(0), dy, dy * exp(x / alpha));
  }
};

struct Sigmoid {
  static constexpr const char *name = "sigmoid", *params = "";
  static constexpr bool from_output = true;
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return sigmoid(x);
  }
  template <class T>
  static FASTOPS_FN T backward(T y, T dy) {
    return dy * (c<T>(1) - y) * y;
  }
};

struct Tanh {
  static constexpr const char *name = "tanh", *params = "";
  static constexpr bool from_output = true;
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return tanh(x);
  }
  template <class T>
  static FASTOPS_FN T backward(T y, T dy) {
    return dy * (c<T>(1) - y * y);
  }
};

struct LogSigmoid {
  static constexpr const char *name = "logsigmoid", *params = "";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return log_sigmoid(x);
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy) {
    return dy * log_sigmoid_slope(x);
  }
};

struct Softplus {
  static constexpr const char *name = "softplus", *params = "float beta=1.0, float threshold=20.0";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x, T beta, T threshold) {
    const T u = x * beta;
    return select(u > threshold, x, (max(u, c<T>(0)) + log1p_unit(exp(-abs(u)))) / beta);
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy, T beta, T threshold) {
    return select(x * beta > threshold, dy, dy * sigmoid(x * beta));
  }
};

struct Softsign {
  static constexpr const char *name = "softsign", *params = "";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return x / (c<T>(1) + abs(x));
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy) {
    const T r = c<T>(1) / (c<T>(1) + abs(x));
    return dy * r * r;  // the square of 1 + |x| may overflow
  }
};

// Also called swish (Elfwing et al., 2017).
struct SiLU {
  static constexpr const char *name = "silu", *params = "";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return x / (c<T>(1) + exp(-x));
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy) {
    const T s = sigmoid(x);
    return dy * s * (c<T>(1) + x * (c<T>(1) - s));
  }
};

// x tanh(softplus(x)) (Misra, 2019). With n = exp(x), tanh(log(1 + n)) = n (n + 2) / (n (n + 2) +
// 2): no tanh, no log.
struct Mish {
  static constexpr const char *name = "mish", *params = "";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T gate(T x) {
    const T n = exp(min(x, c<T>(20))), w = n * (n + c<T>(2));  // beyond 20 the gate is 1
    return w / (w + c<T>(2));
  }
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return x * gate(x);
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy) {
    const T t = gate(x);
    return dy * (t + x * (c<T>(1) - t * t) * sigmoid(x));
  }
};

// Howard et al., 2019.
struct Hardsigmoid {
  static constexpr const char *name = "hardsigmoid", *params = "";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return min(max(x + c<T>(3), c<T>(0)), c<T>(6)) / c<T>(6);
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy) {
    return select(x > c<T>(-3), select(x < c<T>(3), dy / c<T>(6), c<T>(0)), c<T>(0));
  }
};

struct Hardswish {
  static constexpr const char *name = "hardswish", *params = "";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return select(x >= c<T>(3), x, x * max(x + c<T>(3), c<T>(0)) / c<T>(6));  // 6 x may overflow
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy) {
    return select(x <= c<T>(-3), c<T>(0), select(x < c<T>(3), dy * (x / c<T>(3) + c<T>(0.5)), dy));
  }
};

// x Phi(x), with Phi the normal distribution's cumulative distribution function (Hendrycks and
// Gimpel, 2016).
struct GELU {
  static constexpr const char *name = "gelu", *params = "";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x) {
    return x * normal(x).cdf;
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy) {
    const auto [cdf, pdf] = normal(x);
    return dy * (cdf + x * pdf);
  }
};

struct GELUTanh {
  static constexpr const char *name = "gelu_tanh", *params = "";
  static constexpr bool from_output = false;
  // With u = sqrt(2 / pi) (x + 0.044715 x^3), 0.5 (1 + tanh(u)) is the logistic function of 2 u;
  // from exp(-|2 u|) it and its slope come without the cancellation that 1 + tanh and 1 - tanh^2
  // have.
  template <class T>
  static FASTOPS_FN T twice_u(T x) {
    return c<T>(1.5957691216057308) * (x + c<T>(0.044715) * x * x * x);
  }
  template <class T>
  static FASTOPS_FN T forward(T x) {
    const T z = twice_u(x), e = exp(-abs(z));
    return x * select(z < c<T>(0), e, c<T>(1)) / (c<T>(1) + e);
  }
  // forward(x) / x, whose Dual is finite.
  template <class T>
  static FASTOPS_FN T gate(T x) {
    const T z = twice_u(within(x, c<T>(-32), c<T>(32))), e = exp(-smooth_abs(z));
    return select(z < c<T>(0), e, c<T>(1)) / (c<T>(1) + e);
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy) {
    // From |x| = 22 on e is 0 in every dtype, and stays 0 when it is multiplied by a finite slope.
    const T a = within(x, c<T>(-32), c<T>(32));
    const T z = twice_u(a), e = exp(-smooth_abs(z)), d = c<T>(1) / (c<T>(1) + e);
    const T slope = c<T>(1.5957691216057308) * (c<T>(1) + c<T>(3 * 0.044715) * a * a);
    return dy * d * (select(z < c<T>(0), e, c<T>(1)) + a * slope * e * d);
  }
};

// Barron, "Squareplus: a softplus-like algebraic rectifier", 2021.
struct SquarePlus {
  static constexpr const char *name = "squareplus", *params = "float b=4.0";
  static constexpr bool from_output = false;
  // sqrt(x^2 + b), which is |x| long before x^2 overflows.
  template <class T>
  static FASTOPS_FN T root(T x, T b) {
    constexpr double kLarge = sizeof(Real<T>) == 4 ? 0x1p60 : 0x1p508;
    const T a = abs(x);
    return select(a > c<T>(kLarge), a, sqrt(x * x + b));
  }
  template <class T>
  static FASTOPS_FN T forward(T x, T b) {
    const T r = root(x, b);
    // Below 0 the sum would cancel.
    return select(x < c<T>(0), c<T>(0.5) * b / (r - x), c<T>(0.5) * x + c<T>(0.5) * r);
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy, T b) {
    return dy * c<T>(0.5) * (c<T>(1) + x / root(x, b));
  }
};

struct Hardshrink {
  static constexpr const char *name = "hardshrink", *params = "float lambd=0.5";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x, T lambd) {
    return select(abs(x) <= lambd, c<T>(0), x);
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy, T lambd) {
    return select(abs(x) <= lambd, c<T>(0), dy);
  }
};

struct Softshrink {
  static constexpr const char *name = "softshrink", *params = "float lambd=0.5";
  static constexpr bool from_output = false;
  template <class T>
  static FASTOPS_FN T forward(T x, T lambd) {
    return select(x > lambd, x - lambd, select(x < -lambd, x + lambd, x * c<T>(0)));  // NaN stays
  }
  template <class T>
  static FASTOPS_FN T backward(T x, T dy, T lambd) {
    return Hardshrink::backward(x, dy, lambd);
  }
};

using Activations = List<ReLU, ReLU6, Hardtanh, LeakyReLU, ELU, SELU, CELU, Sigmoid, Tanh,
                         LogSigmoid, Softplus, Softsign, SiLU, Mish, Hardsigmoid, Hardswish, GELU,
                         GELUTanh, SquarePlus, Hardshrink, Softshrink>;

// ------------------------------------------------------------------------------------------------
// An activation of a sum: y = forward(x, t), and dx = dt = backward(x, t, dy), which a formula that
// is told by its output leaves to its activation's. `broadcast`: t is one row, repeated along x.

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
