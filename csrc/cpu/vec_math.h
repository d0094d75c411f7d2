// The words of math.h for vectors, for the instruction set that this is compiled for.
//
// exp, log, tanh, erf, expm1, log1p, log1p_unit and logs of vectors of float are within 2 ulp and
// without branches, as the normal distribution is; vectors of double keep at::vec's words (1 ulp).
//
// The polynomials are minimax fits of our own: Lawson's iteratively reweighted least squares (1961)
// on Chebyshev nodes, weighted so that the error is relative to the result; the coefficients were
// rounded to float one at a time, lowest power first, and the rest fitted again. The errors stated
// are the largest over all floats of magnitude 2^-13 to 2^7 and every 61st of the others, against
// the C library's double: AVX512, AVX2, DEFAULT. tests/test_words.py repeats this with a stride.
#pragma once
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include "../scalar_math.h"

namespace fastops {
inline namespace CPU_CAPABILITY {

template <class T>
using Vec = at::vec::Vectorized<T>;

// Names in here would hide the scalar words from code of this namespace.
using ::fastops::abs, ::fastops::within, ::fastops::erf, ::fastops::exp, ::fastops::expm1,
    ::fastops::log, ::fastops::log1p;
using ::fastops::larger, ::fastops::max, ::fastops::min, ::fastops::select, ::fastops::sqrt,
    ::fastops::tanh;
using ::fastops::log1p_unit;
using ::fastops::wide_product;

template <class T>
FASTOPS_FN Vec<T> select(Vec<T> c, Vec<T> a, Vec<T> b) {
  return Vec<T>::blendv(b, a, c);
}
template <class T>
FASTOPS_FN Vec<T> max(Vec<T> a, Vec<T> b) {
  return at::vec::maximum(a, b);
}
template <class T>
FASTOPS_FN Vec<T> min(Vec<T> a, Vec<T> b) {
  return at::vec::minimum(a, b);
}
template <class T>
FASTOPS_FN Vec<T> larger(Vec<T> a, Vec<T> b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_max_ps(a, b);
  if constexpr (std::is_same_v<T, double>) return _mm512_max_pd(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) return _mm256_max_ps(a, b);
  if constexpr (std::is_same_v<T, double>) return _mm256_max_pd(a, b);
#endif
  return select(a > b, a, b);
}
template <class T>
FASTOPS_FN Vec<T> within(Vec<T> x, Vec<T> low, Vec<T> high) {
  const Vec<T> above = larger(low, x);
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_min_ps(high, above);
  if constexpr (std::is_same_v<T, double>) return _mm512_min_pd(high, above);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) return _mm256_min_ps(high, above);
  if constexpr (std::is_same_v<T, double>) return _mm256_min_pd(high, above);
#endif
  return select(high < above, high, above);
}
template <class T>
FASTOPS_FN Vec<T> sqrt(Vec<T> x) {
  return x.sqrt();
}
template <class T>
FASTOPS_FN Vec<T> abs(Vec<T> x) {
  return x.abs();
}

namespace vec_math {

// ------------------------------------------------------------------------------------ registers
// F holds floats in one register, I their bits. Operators on them are those of GCC and clang.
#if defined(CPU_CAPABILITY_AVX512)
using F = __m512;
#elif defined(CPU_CAPABILITY_AVX2)
using F = __m256;
#elif defined(__SSE2__)
using F = __m128;
#else
typedef float F __attribute__((vector_size(16)));
#endif
typedef int I __attribute__((vector_size(sizeof(F))));

FASTOPS_FN F splat(float x) { return x - F{}; }

// min and max hand on a NaN in x. The forms of the intrinsics that take a mask are the same
// instructions, but g++ 12 does not warn about its own header in them.
#if defined(CPU_CAPABILITY_AVX512)
FASTOPS_FN F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
FASTOPS_FN F min(F x, float top) { return _mm512_maskz_min_ps(-1, splat(top), x); }
FASTOPS_FN F max(F x, float low) { return _mm512_maskz_max_ps(-1, splat(low), x); }
#elif defined(CPU_CAPABILITY_AVX2)
FASTOPS_FN F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
FASTOPS_FN F min(F x, float top) { return _mm256_min_ps(splat(top), x); }
FASTOPS_FN F max(F x, float low) { return _mm256_max_ps(splat(low), x); }
#elif defined(__SSE2__)
FASTOPS_FN F fma(F a, F b, F c) { return a * b + c; }
FASTOPS_FN F min(F x, float top) { return _mm_min_ps(splat(top), x); }
FASTOPS_FN F max(F x, float low) { return _mm_max_ps(splat(low), x); }
#else
FASTOPS_FN F fma(F a, F b, F c) { return a * b + c; }
FASTOPS_FN F min(F x, float top) { return x > top ? splat(top) : x; }
FASTOPS_FN F max(F x, float low) { return x < low ? splat(low) : x; }
#endif
FASTOPS_FN F fma(F a, F b, float c) { return fma(a, b, splat(c)); }
FASTOPS_FN F fma(F a, float b, F c) { return fma(a, splat(b), c); }
FASTOPS_FN F fma(F a, float b, float c) { return fma(a, splat(b), splat(c)); }

FASTOPS_FN F magnitude(F x) { return (F)((I)x & 0x7fffffff); }
// The sign of x on a y that is negative only where x is.
FASTOPS_FN F with_sign_of(F x, F y) { return (F)((I)y | ((I)x & (-0x7fffffff - 1))); }

// c[0] + c[1] x + c[2] x^2 ...
template <int n>
FASTOPS_FN F polynomial(F x, const float (&c)[n]) {
  F y = splat(c[n - 1]);
#pragma GCC unroll 16
  for (int k = n - 2; k >= 0; --k) y = fma(y, x, c[k]);
  return y;
}

// ------------------------------------------------------------------------------------ exponentials
// ln 2 in two parts (Cody and Waite, 1980). The first has 16 bits, so that its product with any
// exponent is exact and an instruction set without fma reduces as well as one with it.
constexpr float kLn2 = 0x1.62e4p-1f, kLn2Rest = 0x1.7f7d1cp-20f;

// Adding this rounds to an integer and leaves that integer in the low bits.
constexpr float kRound = 0x1.8p23f;

// x = n ln2 + r with |r| <= ln2 / 2 and shifted = n + kRound.
struct Reduced {
  F shifted, r;
};
FASTOPS_FN Reduced reduce(F x) {
  const F shifted = fma(x, 0x1.715476p+0f, kRound);
  const F n = shifted - kRound;
  return {shifted, fma(n, -kLn2Rest, fma(n, -kLn2, x))};
}

// 2^n scale, where neither the result nor scale is out of the range of normal scalars.
FASTOPS_FN F power(I shifted, float scale) { return (F)((shifted << 23) + (I)splat(scale)); }

// (e^r - 1 - r) / r^2
FASTOPS_FN F exp_tail(F r) {
  constexpr float c[] = {0x1.fffffep-2f, 0x1.5554b2p-3f, 0x1.5556f8p-5f, 0x1.1226d8p-7f,
                         0x1.6b9704p-10f};
  return polynomial(r, c);
}
FASTOPS_FN F exp_reduced(F r) { return fma(fma(exp_tail(r), r, 1.f), r, 1.f); }
FASTOPS_FN F expm1_reduced(F r) { return fma(exp_tail(r), r * r, r); }

// y 2^n, where shifted = n + kRound
FASTOPS_FN F scaled(F y, F shifted) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_scalef_ps(-1, y, shifted - kRound);
#else
  // 2^n itself may be out of range at both ends.
  const I half = (I)shifted >> 1;
  return y * power(half, 1.f) * power((I)shifted - half, 1.f);
#endif
}

// exp: all floats; denormal results are rounded once, not flushed. Of several vectors part by part:
// a part's steps wait for each other, and a processor that looks ahead for others finds those of
// the next vector at hand. at most 0.92, 0.92, 1.19 ulp exp(-inf) = 0, exp(inf) = exp(> 88.72284) =
// inf, exp(+-0) = 1, exp(nan) = nan
template <int m>
FASTOPS_FN void exp(F (&x)[m]) {
  Reduced of[m];
#pragma GCC unroll 8
  for (int k = 0; k < m; ++k) of[k] = reduce(max(min(x[k], 89.f), -104.f));
#pragma GCC unroll 8
  for (int k = 0; k < m; ++k) x[k] = exp_reduced(of[k].r);
#pragma GCC unroll 8
  for (int k = 0; k < m; ++k) x[k] = scaled(x[k], of[k].shifted);
}
FASTOPS_FN F exp(F x) {
  F one[] = {x};
  exp(one);
  return one[0];
}

// expm1: all floats
// at most 1.53, 1.53, 1.66 ulp
// expm1(-inf) = -1, expm1(inf) = inf, expm1(+-0) = +-0, expm1(denormal) = itself, expm1(nan) = nan
FASTOPS_FN F expm1(F x) {
  const auto [shifted, r] = reduce(max(min(x, 89.f), -18.f));
  const F half_power = power((I)shifted, .5f);  // 2^n overflows below the largest result
  const F half = fma(half_power, expm1_reduced(r), half_power - .5f);
  return magnitude(x) < 0x1p-24f ? x : half + half;
}

// ------------------------------------------------------------------------------------ logarithms
// (1 + f) 2^n with |f| <= 1/3
struct Split {
  F f, n;
};
// log of it. Of several, step by step: see exp.
template <int m>
FASTOPS_FN void log_split(const Split (&s)[m], F (&y)[m]) {
  constexpr float c[] = {0x1.555506p-2f, -0x1.fffefap-3f, 0x1.99d054p-3f, -0x1.559c54p-3f,
                         0x1.1ed508p-3f, -0x1.f335d0p-4f, 0x1.1e6eb6p-3f, -0x1.07bc3cp-3f};
  for (F& p : y) p = splat(c[7]);
#pragma GCC unroll 16
  for (int j = 6; j >= 0; --j)
#pragma GCC unroll 4
    for (int k = 0; k < m; ++k) y[k] = fma(y[k], s[k].f, c[j]);
#pragma GCC unroll 4
  for (int k = 0; k < m; ++k) {
    const auto [f, n] = s[k];
    const F p = fma(y[k], f, -.5f);
    y[k] = fma(n, kLn2, f + fma(p, f * f, n * kLn2Rest));
  }
}
FASTOPS_FN F log_split(const Split& s) {
  const Split one[] = {s};
  F y[1];
  log_split(one, y);
  return y[0];
}

// n with u / 2^n in [2/3, 4/3)
FASTOPS_FN I exponent(F u) { return ((I)u - 0x3f2aaaab) >> 23; }

// y, or what the logarithm of u is where u is zero, negative, infinite or not a number.
FASTOPS_FN F or_special(F y, F u) {
#if defined(CPU_CAPABILITY_AVX512)
  // One digit for each class of u, from the right: quiet and signalling nan, 0, 1, -inf, inf,
  // negative, positive. 0 is y, 2 is u, 3 is nan, 4 is -inf, 5 is inf.
  return _mm512_fixupimm_ps(y, u, _mm512_set1_epi32(0x03530422), 0);
#else
  const F low = u == 0.f ? splat(-__builtin_inff()) : splat(__builtin_nanf(""));
  const F high = u < __builtin_inff() ? y : u;
  return u > 0.f ? high : low;
#endif
}

FASTOPS_FN Split split(F x) {
  const I tiny = x < 0x1p-126f;
  const F u = tiny ? x * 0x1p32f : x;
  const I n = exponent(u);
  return {(F)((I)u - (n << 23)) - 1.f, __builtin_convertvector(n + (tiny & -32), F)};
}
// log: all floats, denormals too
// at most 0.89, 0.89, 0.96 ulp
// log(+-0) = -inf, log(inf) = inf, log(1) = 0, log(< 0) = log(nan) = nan
FASTOPS_FN F log(F x) { return or_special(log_split(split(x)), x); }

// of u = 1 + x
FASTOPS_FN Split split_from_1(F x, F u) {
  // u = 1 + x is rounded only to find n: f = x 2^-n + (2^-n - 1) rounds once, near 0 not at all.
  // 2^-n is held as 2^(2-n), which is a normal number for every n.
  const I n = exponent(u);
  const F s = (F)(0x40800000 - (n << 23));
  return {fma(x * .25f, s, fma(s, .25f, -1.f)), __builtin_convertvector(n, F)};
}
FASTOPS_FN F or_tiny(F y, F x) { return magnitude(x) < 0x1p-24f ? x : y; }
// log1p: all floats
// at most 1.60, 1.60, 1.71 ulp
// log1p(-1) = -inf, log1p(inf) = inf, log1p(+-0) = +-0, log1p(denormal) = itself,
// log1p(< -1) = log1p(nan) = nan
FASTOPS_FN F log1p(F x) {
  const F u = x + 1.f;
  return or_tiny(or_special(log_split(split_from_1(x, u)), u), x);
}

// log(x) and log1p(-x) at once, the same to the bit
struct Both {
  F of, of_rest;
};
FASTOPS_FN Both logs(F x) {
  const F minus = -x, u = minus + 1.f;
  const Split two[] = {split(x), split_from_1(minus, u)};
  F y[2];
  log_split(two, y);
  return {or_special(y[0], x), or_tiny(or_special(y[1], u), minus)};
}

// log1p_unit: 0 <= x <= 1, of which nothing need be split off
// at most 1.13, 1.13, 1.51 ulp
// log1p_unit(0) = 0, log1p_unit(denormal) = itself, log1p_unit(nan) = nan
FASTOPS_FN F log1p_unit(F x) {
  constexpr float c[] = {-0x1.ffffd2p-2f, 0x1.554ddp-2f,  -0x1.ff23e8p-3f,
                         0x1.934b6ep-3f,  -0x1.3a43ep-3f, 0x1.b4b094p-4f,
                         -0x1.d6b76p-5f,  0x1.492126p-6f, -0x1.af5e5p-9f};
  return fma(x * x, polynomial(x, c), x);
}

// ------------------------------------------------------------------------------------ tanh, erf
// tanh: all floats
// at most 0.80, 1.96, 2.00 ulp
// tanh(+-inf) = +-1, tanh(+-0) = +-0, tanh(denormal) = itself, tanh(nan) = nan
FASTOPS_FN F tanh(F x);

// erf: all floats
// at most 1.22, 1.11, 1.41 ulp
// erf(+-inf) = +-1, erf(+-0) = +-0, erf(nan) = nan
FASTOPS_FN F erf(F x);

#if defined(CPU_CAPABILITY_AVX512)
// A function in 16 intervals, one column each: a point c in the interval, the function there, and
// the coefficients of the powers of x - c. One instruction looks 16 columns up, so this costs
// neither a division nor an exponential. The points were chosen near the middle so that the
// function's value is almost a float (Gal, 1986). In the interval from 0, c is 0 and the value is
// left out: it is x, and the polynomial is that of the function less x.
alignas(64) constexpr float kTanh[8][16] = {
    {0x1.80160ap+0f, 0x1.01ab54p+1f, 0x1.3f390ap+1f, 0x1.7f903ap+1f, 0x1.dea94ep+1f, 0x1.2e16a8p+2f,
     0x1.6fb5c4p+2f, 0x1.aea39cp+2f, 0x1.09dcfcp+3f, 0.f, 0.f, 0x1.81306ep-3f, 0x1.860a9ep-2f,
     0x1.3dd69ap-1f, 0x1.bf70dep-1f, 0x1.1ed542p+0f},
    {0x1.cf778ep-1f, 0x1.ee0c48p-1f, 0x1.f91038p-1f, 0x1.fd7364p-1f, 0x1.ff6c08p-1f, 0x1.ffeb2cp-1f,
     0x1.fffd52p-1f, 0x1.ffffa0p-1f, 0x1.fffffcp-1f, 0.f, 0.f, 0x1.7cb5eap-3f, 0x1.743662p-2f,
     0x1.1a746ap-1f, 0x1.681e0cp-1f, 0x1.9d8dccp-1f},
    {0x1.71dc9cp-3f, 0x1.1a3262p-4f, 0x1.b8f022p-6f, 0x1.457e10p-7f, 0x1.27c6c2p-9f,
     0x1.4d3ac8p-12f, 0x1.5700fcp-15f, 0x1.80008ep-18f, 0x1.04c3e6p-22f, 0.f, 0.f, 0x1.ee4e9cp-1f,
     0x1.bc5a3ep-1f, 0x1.642daap-1f, 0x1.02b5bep-1f, 0x1.63ed2ep-2f},
    {-0x1.4ecd58p-3f, -0x1.104d52p-4f, -0x1.b2f6cap-6f, -0x1.43df22p-7f, -0x1.276f8cp-9f,
     -0x1.4d28dap-12f, -0x1.56fea4p-15f, -0x1.8004b2p-18f, -0x1.2dc7a0p-22f, 0.f, -0x1.4ed84ep-25f,
     -0x1.6f8decp-3f, -0x1.4308bep-2f, -0x1.88fc42p-2f, -0x1.6bedf0p-2f, -0x1.1f7d62p-2f},
    {0x1.679c74p-4f, 0x1.5164f0p-5f, 0x1.1a1696p-6f, 0x1.ab80b6p-8f, 0x1.88a484p-10f,
     0x1.bbaa96p-13f, 0x1.c8d3b4p-16f, 0x1.ffac48p-19f, 0x1.5bfae6p-23f, 0.f, -0x1.55542cp-2f,
     -0x1.2763f2p-2f, -0x1.65a6eap-3f, -0x1.4aaf58p-6f, 0x1.4df752p-4f, 0x1.c644bep-4f},
    {-0x1.993a70p-6f, -0x1.201f2ep-6f, -0x1.0a93dep-7f, -0x1.a2fb14p-9f, -0x1.873c56p-11f,
     -0x1.bc66cap-14f, -0x1.c8f4b4p-17f, -0x1.ffc124p-20f, 0x1.b21706p-27f, 0.f, -0x1.57a716p-13f,
     0x1.d04ab0p-4f, 0x1.594c88p-3f, 0x1.1cc3c2p-3f, 0x1.f4a8b6p-5f, 0x1.06260ap-8f},
    {-0x1.92b8e4p-9f, 0x1.342040p-8f, 0x1.7af9a6p-9f, 0x1.442990p-10f, 0x1.427420p-12f,
     0x1.70ae2cp-15f, 0x1.7d17a6p-18f, 0x1.a82d88p-21f, 0x1.2e3e18p-25f, 0.f, 0x1.167e62p-3f,
     0x1.978ceap-4f, 0x1.160018p-6f, -0x1.b4f188p-5f, -0x1.de936ep-5f, -0x1.094894p-5f},
    {0x1.db2630p-8f, -0x1.cde7bcp-14f, -0x1.76aaf8p-11f, -0x1.87c836p-12f, -0x1.9c666cp-14f,
     -0x1.cef278p-17f, -0x1.f74e7ep-20f, -0x1.1447fap-22f, -0x1.292940p-24f, 0.f, -0x1.3fd3f0p-6f,
     -0x1.4860d6p-5f, -0x1.13386ap-4f, -0x1.92fdaap-6f, 0x1.a89854p-7f, 0x1.2efe9ep-6f},
};
alignas(64) constexpr float kErf[7][16] = {
    {0.f, 0x1.ff9e0ap-3f, 0x1.009b0ap-1f, 0x1.86ccccp-1f, 0x1.051848p+0f, 0x1.446c22p+0f,
     0x1.8709d4p+0f, 0x1.c50a24p+0f, 0x1.044d02p+1f, 0x1.23e5f2p+1f, 0x1.4527cep+1f, 0x1.64c8b6p+1f,
     0x1.85defcp+1f, 0x1.a5cb02p+1f, 0x1.c7ada6p+1f, 0x1.e82a66p+1f},
    {0.f, 0x1.1ac162p-2f, 0x1.0b0720p-1f, 0x1.7070aap-1f, 0x1.b39be8p-1f, 0x1.da9276p-1f,
     0x1.f0409ep-1f, 0x1.f9b09ap-1f, 0x1.fdf004p-1f, 0x1.ff5aeap-1f, 0x1.ffd512p-1f, 0x1.fff568p-1f,
     0x1.fffdd6p-1f, 0x1.ffff96p-1f, 0x1.fffff0p-1f, 0x1.fffffep-1f},
    {0x1.06eba8p-3f, 0x1.0f6394p+0f, 0x1.c16776p-1f, 0x1.42a17ep-1f, 0x1.985244p-2f, 0x1.cfc848p-3f,
     0x1.c03b6ap-4f, 0x1.936432p-5f, 0x1.27b0c6p-6f, 0x1.97c0d6p-8f, 0x1.d21c6ep-10f,
     0x1.f3d3d4p-12f, 0x1.ba9efcp-14f, 0x1.6c2838p-16f, 0x1.da8190p-19f, 0x1.24499ep-21f},
    {0x1.5461c2p-22f, -0x1.0f2e76p-2f, -0x1.c27634p-2f, -0x1.ec836ep-2f, -0x1.a072c2p-2f,
     -0x1.25df50p-2f, -0x1.56570cp-3f, -0x1.64f108p-4f, -0x1.2ca872p-5f, -0x1.d0ebc6p-7f,
     -0x1.27fe5ap-8f, -0x1.5c42a2p-10f, -0x1.50f774p-12f, -0x1.2be75cp-14f, -0x1.c8ec4cp-17f,
     -0x1.cce29ap-18f},
    {-0x1.812ba6p-2f, -0x1.3cb2d6p-2f, -0x1.2a27a2p-3f, 0x1.1c1de4p-5f, 0x1.261854p-3f,
     0x1.55f3f4p-3f, 0x1.11ec98p-3f, 0x1.61ddecp-4f, 0x1.6655f6p-5f, 0x1.3f7530p-6f, 0x1.ce6a6cp-8f,
     0x1.2ed8b6p-9f, 0x1.43b20ap-11f, 0x1.3a7046p-13f, 0x1.d2a7f8p-16f, 0x1.304e44p-20f},
    {0x1.3c8142p-12f, 0x1.020a32p-3f, 0x1.74c664p-3f, 0x1.2c19dcp-3f, 0x1.ffbfbap-5f,
     -0x1.3c708ap-7f, -0x1.790172p-5f, -0x1.82d8e0p-5f, -0x1.082c68p-5f, -0x1.1fd5d2p-6f,
     -0x1.ec90a0p-8f, -0x1.7042dcp-9f, -0x1.bc388ap-11f, -0x1.ddda72p-13f, 0x1.2a31f4p-16f,
     0x1.359368p-12f},
    {0x1.c64e0ap-4f, 0x1.482d1ep-4f, 0x1.83a77ap-8f, -0x1.bb6942p-5f, -0x1.176b08p-4f,
     -0x1.6e5556p-5f, -0x1.979998p-7f, 0x1.fe08aep-8f, 0x1.aabb6cp-7f, 0x1.48c550p-7f,
     0x1.695766p-8f, 0x1.3828a0p-9f, 0x1.b917b2p-11f, 0x1.042540p-12f, 0x1.5efd56p-13f,
     0x1.094808p-11f},
};

template <int rows>
FASTOPS_FN F piecewise(const float (&table)[rows][16], I column, F x) {
  const auto index = (__m512i)column;
  const F t = x - _mm512_maskz_permutexvar_ps(-1, index, _mm512_load_ps(table[0]));
  const auto not_first = _mm512_cmp_ps_mask(t, x, _CMP_NEQ_UQ);
  F y = _mm512_maskz_permutexvar_ps(-1, index, _mm512_load_ps(table[rows - 1]));
#pragma GCC unroll 16
  for (int k = rows - 2; k > 1; --k) {
    y = fma(y, t, _mm512_maskz_permutexvar_ps(-1, index, _mm512_load_ps(table[k])));
  }
  return fma(y, t, _mm512_mask_permutexvar_ps(x, not_first, index, _mm512_load_ps(table[1])));
}

// The intervals of |x| + 0.75 are quarters of a power of two: narrow where tanh bends. 15 are used.
FASTOPS_FN F tanh(F x) {
  const F a = min(magnitude(x), 9.2f);
  return with_sign_of(x, piecewise(kTanh, (I)(a + .75f) >> 21, a));
}

FASTOPS_FN F erf(F x) {
  const F a = min(magnitude(x), 3.93f);
  return with_sign_of(x, piecewise(kErf, (I)fma(a, 3.94f, kRound), a));
}
#else
// -expm1(-2|x|) / (expm1(-2|x|) + 2), both from 2^n and expm1(r) with one rounding each
FASTOPS_FN F tanh(F x) {
  const F a = max(-magnitude(x), -10.f);
  const auto [shifted, r] = reduce(a + a);
  const F s = power((I)shifted, 1.f), p = expm1_reduced(r);
  return with_sign_of(x, fma(-s, p, 1.f - s) / fma(s, p, 1.f + s));
}

// x + x P(x^2) up to 0.875, and 1 - exp(-Q(|x|)) from there
FASTOPS_FN F erf(F x) {
  constexpr float p[] = {0x1.06eba6p-3f,  -0x1.8126eep-2f, 0x1.ce1bfap-4f,
                         -0x1.b6a384p-6f, 0x1.47d2a6p-8f,  -0x1.3ca622p-11f};
  constexpr float minus_q[] = {-0x1.182140p-13f, -0x1.20c06cp+0f, -0x1.46026cp-1f, -0x1.ab5354p-4f,
                               0x1.6f5542p-6f,   -0x1.95504ep-9f, 0x1.a58594p-13f};
  const F a = min(magnitude(x), 4.f);
  const F low = fma(x, polynomial(x * x, p), x);
  const auto [shifted, r] = reduce(polynomial(a, minus_q));
  const F high = with_sign_of(x, fma(-power((I)shifted, 1.f), exp_reduced(r), 1.f));
  return a < .875f ? low : high;
}

// The normal distribution's cdf, and its density times sqrt(2 pi), which are 0 or below 2^-126 from
// |x| = 13.3. The rounding of x^2 is in their exponents:
// cdf: at most 4.3 + 1.5 x^2, 4.4 + 1.5 x^2 ulp; density: at most 1.8 + x^2, 1.9 + x^2 ulp
// (AVX2, DEFAULT; AVX512 has them of erf and exp)
// normal(-inf) = {0, 0}, normal(inf) = {1, 0}, normal(nan) = {nan, any}
struct Tail {
  F cdf, e;
};
FASTOPS_FN Tail normal(F x) {
  // 2^(n + r) = exp(-x^2 / 2). From n = -126 on the exponent that is added leaves a denormal, or 0.
  constexpr float c[] = {1.f,
                         0x1.62e430p-1f,
                         0x1.ebfbdcp-3f,
                         0x1.c6af7ap-5f,
                         0x1.3b2dd2p-7f,
                         0x1.5f0948p-10f,
                         0x1.417a9ap-13f};
  const F y = max(x * x * -0x1.715476p-1f, -127.f);
  const F shifted = y + kRound;
  const F e = (F)((I)polynomial(y - (shifted - kRound), c) + ((I)shifted << 23));
  // Mills' ratio, cdf(-a) / exp(-a^2 / 2), in a / (1 + 0.335 a), which is accurate at 0 as well
  constexpr float mills[] = {.5f,
                             -0x1.98846ep-2f,
                             0x1.dc9f5cp-4f,
                             -0x1.517062p-7f,
                             -0x1.e9db7ap-10f,
                             0x1.c2a468p-15f,
                             0x1.48e598p-13f,
                             -0x1.794c56p-16f};
  const F a = min(magnitude(x), 14.f);
  const F below = polynomial(a / fma(a, 0x1.570a3ep-2f, 1.f), mills) * e;
  return {(I)x < 0 ? below : 1.f - below, e};
}
#endif
}  // namespace vec_math

// at::vec's vector is one register, or in DEFAULT an array of two. Of double, a word is at::vec's
// `of_double`.
#define FASTOPS_WORD(word, of_double)               \
  FASTOPS_FN Vec<float> word(const Vec<float>& x) { \
    vec_math::F f[sizeof(x) / sizeof(vec_math::F)]; \
    x.store(f);                                     \
    for (vec_math::F& v : f) v = vec_math::word(v); \
    return Vec<float>::loadu(f);                    \
  }                                                 \
  FASTOPS_FN Vec<double> word(const Vec<double>& x) { return x.of_double(); }

FASTOPS_WORD(exp, exp)
FASTOPS_WORD(log, log)
FASTOPS_WORD(tanh, tanh)
FASTOPS_WORD(erf, erf)
FASTOPS_WORD(expm1, expm1)
FASTOPS_WORD(log1p, log1p)
FASTOPS_WORD(log1p_unit, log1p)
#undef FASTOPS_WORD

FASTOPS_FN Logs<Vec<float>> logs(const Vec<float>& x) {
  constexpr int count = sizeof(x) / sizeof(vec_math::F);
  vec_math::F of[count], of_rest[count];
  x.store(of);
  for (int k = 0; k < count; ++k) {
    const vec_math::Both both = vec_math::logs(of[k]);
    of[k] = both.of;
    of_rest[k] = both.of_rest;
  }
  return {Vec<float>::loadu(of), Vec<float>::loadu(of_rest)};
}

// The exponentials of several vectors at once.
template <int m, int n>
FASTOPS_FN void exp(Vec<float> (&x)[m][n]) {
  constexpr int count = sizeof(Vec<float>) / sizeof(vec_math::F);
  vec_math::F f[m * n * count];
#pragma GCC unroll 8
  for (int k = 0; k < m * n; ++k) x[k / n][k % n].store(f + k * count);
  vec_math::exp(f);
#pragma GCC unroll 8
  for (int k = 0; k < m * n; ++k) x[k / n][k % n] = Vec<float>::loadu(f + k * count);
}
template <int m, int n>
FASTOPS_FN void exp(Vec<double> (&x)[m][n]) {
  for (auto& row : x)
    for (auto& v : row) v = exp(v);
}

#if !defined(CPU_CAPABILITY_AVX512)
FASTOPS_FN Normal<Vec<float>> normal(const Vec<float>& x) {
  constexpr int count = sizeof(x) / sizeof(vec_math::F);
  vec_math::F f[count], e[count];
  x.store(f);
  for (int k = 0; k < count; ++k) {
    const vec_math::Tail tail = vec_math::normal(f[k]);
    f[k] = tail.cdf;
    e[k] = tail.e * 0.3989423f;
  }
  return {Vec<float>::loadu(f), Vec<float>::loadu(e)};
}
#endif
}  // namespace CPU_CAPABILITY

template <class T>
struct RealOf<at::vec::Vectorized<T>> {
  using type = T;
};

}  // namespace fastops
