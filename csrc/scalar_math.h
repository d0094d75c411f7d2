// The words of math.h for a float or a double.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define FASTOPS_FN __host__ __device__ __forceinline__
#else
#define FASTOPS_FN inline __attribute__((always_inline))
#endif

namespace fastops {

// ------------------------------------------------------------------------------------------------
// scalars

FASTOPS_FN float exp(float x) { return ::expf(x); }
FASTOPS_FN double exp(double x) { return ::exp(x); }
FASTOPS_FN float log(float x) { return ::logf(x); }
FASTOPS_FN double log(double x) { return ::log(x); }
FASTOPS_FN float tanh(float x) { return ::tanhf(x); }
FASTOPS_FN double tanh(double x) { return ::tanh(x); }
FASTOPS_FN float erf(float x) { return ::erff(x); }
FASTOPS_FN double erf(double x) { return ::erf(x); }
FASTOPS_FN float expm1(float x) { return ::expm1f(x); }
FASTOPS_FN double expm1(double x) { return ::expm1(x); }
FASTOPS_FN float log1p(float x) { return ::log1pf(x); }
FASTOPS_FN double log1p(double x) { return ::log1p(x); }
// log1p where 0 <= x <= 1, as exp(-abs(x)) is: a vector of floats needs a third of the instructions
// there.
FASTOPS_FN float log1p_unit(float x) { return ::log1pf(x); }
FASTOPS_FN double log1p_unit(double x) { return ::log1p(x); }
FASTOPS_FN float sqrt(float x) { return ::sqrtf(x); }
FASTOPS_FN double sqrt(double x) { return ::sqrt(x); }
FASTOPS_FN float abs(float x) { return ::fabsf(x); }
FASTOPS_FN double abs(double x) { return ::fabs(x); }

// min and max hand on a NaN from either side, as torch.minimum and torch.maximum do.
template <class T>
  requires std::is_floating_point_v<T>
FASTOPS_FN T max(T a, T b) {
  return a > b || a != a ? a : b;
}
template <class T>
  requires std::is_floating_point_v<T>
FASTOPS_FN T min(T a, T b) {
  return a < b || a != a ? a : b;
}
template <class T>
  requires std::is_floating_point_v<T>
FASTOPS_FN T select(bool c, T a, T b) {
  return c ? a : b;
}

// The larger, or b where the two do not compare: for maxima over values that are summed as well,
// where a NaN shows.
template <class T>
  requires std::is_floating_point_v<T>
FASTOPS_FN T larger(T a, T b) {
  return a > b ? a : b;
}

// x within [low, high]. A NaN stays one.
template <class T>
  requires std::is_floating_point_v<T>
FASTOPS_FN T within(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

// Both halves of a 32 x 32 bit product.
FASTOPS_FN void wide_product(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

// `Real<T>`: the scalar that T is made of.
template <class T>
struct RealOf {
  using type = T;
};
template <class T>
using Real = typename RealOf<T>::type;

// The normal distribution at x: its cumulative distribution function and its density.
template <class T>
struct Normal {
  T cdf, pdf;
};

// log(x) and log(1 - x)
template <class T>
struct Logs {
  T of, of_rest;
};

}  // namespace fastops
