// The vocabulary that formulas are written in: the same words for a float or double in a CUDA
// thread, for a vector register of them on the CPU, and for a Dual of either (a value with its
// derivative). No loop, no torch, no formula.
#pragma once
#include "scalar_math.h"

// Vectors exist where a CPU loop is compiled for one instruction set; elsewhere (nvcc, emulation,
// tests) only scalars.
#if defined(CPU_CAPABILITY) && !defined(__CUDACC__) && !defined(FASTOPS_EMULATION)
#include "cpu/vec_math.h"
#endif

namespace fastops {

// ------------------------------------------------------------------------------------------------
// derivatives

// A value and its derivative along one direction. A formula evaluated on Duals
// differentiates itself: this is where every second derivative comes from, so that no formula
// states its own.
template <class T>
struct Dual {
  T v, d;
  FASTOPS_FN Dual() : v(T(Real<T>(0))), d(T(Real<T>(0))) {}
  FASTOPS_FN explicit Dual(double c) : v(T(Real<T>(c))), d(T(Real<T>(0))) {}
  FASTOPS_FN Dual(T v, T d) : v(v), d(d) {}

  friend FASTOPS_FN Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
  friend FASTOPS_FN Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
  friend FASTOPS_FN Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.d * b.v + a.v * b.d}; }
  friend FASTOPS_FN Dual operator/(Dual a, Dual b) {
    const T q = a.v / b.v;
    return {q, (a.d - q * b.d) / b.v};
  }
  FASTOPS_FN Dual operator-() const { return Dual(0.0) - *this; }
  friend FASTOPS_FN auto operator>(Dual a, Dual b) { return a.v > b.v; }
  friend FASTOPS_FN auto operator<(Dual a, Dual b) { return a.v < b.v; }
  friend FASTOPS_FN auto operator>=(Dual a, Dual b) { return a.v >= b.v; }
  friend FASTOPS_FN auto operator<=(Dual a, Dual b) { return a.v <= b.v; }
};
template <class T>
struct RealOf<Dual<T>> : RealOf<T> {};

template <class C, class T>
FASTOPS_FN Dual<T> select(C c, Dual<T> a, Dual<T> b) {
  return {select(c, a.v, b.v), select(c, a.d, b.d)};
}
template <class T>
FASTOPS_FN Dual<T> max(Dual<T> a, Dual<T> b) {
  return {max(a.v, b.v), select(a.v > b.v, a.d, b.d)};
}
template <class T>
FASTOPS_FN Dual<T> min(Dual<T> a, Dual<T> b) {
  return {min(a.v, b.v), select(a.v < b.v, a.d, b.d)};
}
template <class T>
FASTOPS_FN Dual<T> within(Dual<T> x, Dual<T> low, Dual<T> high) {
  const T none = T(Real<T>(0));
  return {within(x.v, low.v, high.v), select(x.v < low.v, none, select(x.v > high.v, none, x.d))};
}
template <class T>
FASTOPS_FN Dual<T> exp(Dual<T> x) {
  const T y = exp(x.v);
  return {y, y * x.d};
}
template <class T>
FASTOPS_FN Dual<T> log(Dual<T> x) {
  return {log(x.v), x.d / x.v};
}
template <class T>
FASTOPS_FN Dual<T> tanh(Dual<T> x) {
  const T y = tanh(x.v);
  return {y, (T(Real<T>(1)) - y * y) * x.d};
}
template <class T>
FASTOPS_FN Dual<T> erf(Dual<T> x) {
  return {erf(x.v), T(Real<T>(1.1283791670955126)) * exp(-(x.v * x.v)) * x.d};
}
template <class T>
FASTOPS_FN Dual<T> expm1(Dual<T> x) {
  return {expm1(x.v), exp(x.v) * x.d};
}
template <class T>
FASTOPS_FN Dual<T> log1p(Dual<T> x) {
  return {log1p(x.v), x.d / (T(Real<T>(1)) + x.v)};
}
template <class T>
FASTOPS_FN Dual<T> log1p_unit(Dual<T> x) {
  return {log1p_unit(x.v), x.d / (T(Real<T>(1)) + x.v)};
}
template <class T>
FASTOPS_FN Dual<T> sqrt(Dual<T> x) {
  const T y = sqrt(x.v);
  return {y, x.d / (y + y)};
}
template <class T>
FASTOPS_FN Dual<T> abs(Dual<T> x) {
  return {abs(x.v),
          select(x.v > T(Real<T>(0)), x.d, select(x.v < T(Real<T>(0)), -x.d, T(Real<T>(0))))};
}

// |x| for formulas that are computed from it but are smooth at 0: a Dual has the slope on the right
// there, and is then that of a formula which takes its other choices (x < 0, min(x, 0)) on the
// right as well.
template <class T>
FASTOPS_FN T smooth_abs(T x) {
  return abs(x);
}
template <class T>
FASTOPS_FN Dual<T> smooth_abs(Dual<T> x) {
  return {abs(x.v), select(x.v < T(Real<T>(0)), -x.d, x.d)};
}

// A constant of a formula, rounded once to T's scalar: `c<T>(0.5)`.
template <class T>
FASTOPS_FN T c(double value) {
  return T(Real<T>(value));
}

template <class T>
FASTOPS_FN Normal<T> normal(T x) {
  return {c<T>(0.5) + c<T>(0.5) * erf(x * c<T>(0.7071067811865476)),
          c<T>(0.3989422804014327) * exp(x * x * c<T>(-0.5))};
}
template <class T>
FASTOPS_FN Normal<Dual<T>> normal(Dual<T> x) {
  const auto [cdf, pdf] = normal(x.v);
  return {{cdf, pdf * x.d}, {pdf, -x.v * pdf * x.d}};
}

template <class T>
FASTOPS_FN Logs<T> logs(T x) {
  return {log(x), log1p(-x)};
}

// log(1 / (1 + exp(-x))), and its derivative 1 / (1 + exp(x)), without an infinity on the way:
// Duals of them are finite.
template <class T>
FASTOPS_FN T log_sigmoid(T x) {
  return min(x, c<T>(0)) - log1p_unit(exp(-smooth_abs(x)));
}
template <class T>
FASTOPS_FN T log_sigmoid_slope(T x) {
  const T e = exp(-smooth_abs(x));
  return select(x < c<T>(0), c<T>(1), e) / (c<T>(1) + e);
}

// 1 / (1 + exp(-x)). A Dual of that would be infinite on the way.
template <class T>
FASTOPS_FN T sigmoid(T x) {
  return c<T>(1) / (c<T>(1) + exp(-x));
}
template <class T>
FASTOPS_FN Dual<T> sigmoid(Dual<T> x) {
  const T y = sigmoid(x.v);
  return {y, y * (c<T>(1) - y) * x.d};
}

// ------------------------------------------------------------------------------------------------
// tables of formulas
template <class... Ops>
struct List {};

// How many scalars a formula's `params` declares ("float alpha=1.0, float beta=2.0": two), and how
// many tensors, each of them an input beside x and t ("Tensor pos_weight": one).
constexpr int count_params(const char* p) {
  int n = 0;
  for (; *p; ++p) n += *p == '=';
  return n;
}
constexpr int count_tensors(const char* p) {
  int n = 0;
  for (; *p; ++p) n += *p == 'T';
  return n;
}
}  // namespace fastops
