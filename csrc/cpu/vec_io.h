// Between memory of a dtype and registers of what it is computed in: loads and stores with masked
// tails, dispatch over dtypes, and formulas called with their parameters. No formula by name.
#pragma once
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

#include <utility>

#include "../kernels/kernel_table.h"
#include "../math.h"

namespace fastops::CPU_CAPABILITY {

// Loads and stores of `size` consecutive elements of scalar_t, which are `count` vectors of real.
// An n below `size` masks the tail: nothing behind it is touched, and it loads as zeros.
template <class scalar_t>
struct VecIO {
  static constexpr bool reduced = sizeof(scalar_t) == 2,
                        bfloat16 = std::is_same_v<scalar_t, c10::BFloat16>;
  using real = std::conditional_t<reduced, float, scalar_t>;
  using V = Vec<real>;
  static constexpr int count = reduced ? 2 : 1;
  static constexpr int64_t size = Vec<scalar_t>::size();

  static FASTOPS_FN void load(const scalar_t* p, int64_t n, V (&v)[count]) {
#if defined(CPU_CAPABILITY_AVX2)
    if constexpr (bfloat16) {
      if (n == size) {
        for (int k = 0; k < 2; ++k) {
          const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + k);
          v[k] = V(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16)));
        }
        return;
      }
    }
#endif
    const Vec<scalar_t> raw = n == size ? Vec<scalar_t>::loadu(p) : Vec<scalar_t>::loadu(p, n);
    if constexpr (reduced) {
      std::tie(v[0], v[1]) = at::vec::convert_to_float<scalar_t>(raw);
    } else {
      v[0] = raw;
    }
  }
  static FASTOPS_FN void store(scalar_t* p, int64_t n, const V (&v)[count]) {
#if defined(CPU_CAPABILITY_AVX2)
    if constexpr (bfloat16) {
      if (n == size) {
        const __m256i halves = _mm256_packus_epi32(rounded(v[0]), rounded(v[1]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(halves, 0xd8));
        return;
      }
    }
#endif
    Vec<scalar_t> raw;
    if constexpr (reduced) {
      raw = at::vec::convert_from_float<scalar_t>(v[0], v[1]);
    } else {
      raw = v[0];
    }
    if (n == size) {
      raw.store(p);
    } else {
      raw.store(p, n);
    }
  }
#if defined(CPU_CAPABILITY_AVX2)
  // To bfloat16, ties to even, as integers; half the instructions of at::vec's.
  static FASTOPS_FN __m256i rounded(V x) {
    const __m256i bits = _mm256_castps_si256(x), half = _mm256_set1_epi32(0x7fff);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(
        _mm256_or_si256(_mm256_add_epi32(bits, _mm256_add_epi32(half, odd)), nan), 16);
  }
#endif
  // Stores `size` elements past the caches, where the instruction set can; p must be aligned, see
  // streams(). A result larger than the caches is then not read into them before it is written. A
  // fence() must follow.
  static FASTOPS_FN void stream(scalar_t* p, const V (&v)[count]) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    alignas(64) scalar_t raw[size];
    store(raw, size, v);
#if defined(CPU_CAPABILITY_AVX512)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_load_si512(raw));
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(raw)));
#endif
#else
    store(p, size, v);
#endif
  }
  // Stores n elements, past the caches where they are `streamed` and a whole vector.
  template <class N>
  static FASTOPS_FN void store(scalar_t* p, N n, const V (&v)[count], bool streamed) {
    if (streamed && n == size) {
      stream(p, v);
    } else {
      store(p, n, v);
    }
  }
  // One element. By the same conversion, as c10's of float16 may be compiled to a function that
  // the instruction sets would share.
  static FASTOPS_FN real one(const scalar_t* p) {
    V v[count];
    load(p, 1, v);
    real lane[V::size()];
    v[0].store(lane);
    return lane[0];
  }
  // Copies lane i.
  static FASTOPS_FN void put(int64_t i, const V (&from)[count], V (&v)[count]) {
    const int64_t k = i / V::size(), lane = i % V::size();
    v[k] = V::set(V::set(v[k], from[k], lane + 1), v[k], lane);
  }
  // Fills the lanes from n on, for sums and maxima over a masked tail.
  static FASTOPS_FN void mask_tail(int64_t n, real filler, V (&v)[count]) {
    for (int k = 0; k < count; ++k) {
      const int64_t left = n - k * V::size();
      v[k] = V::set(V(filler), v[k], left < 0 ? 0 : left > V::size() ? V::size() : left);
    }
  }
};

// The lanes of a vector in double.
FASTOPS_FN void promote(const Vec<double>& v, Vec<double> (&wide)[1]) { wide[0] = v; }
FASTOPS_FN void promote(const Vec<float>& v, Vec<double> (&wide)[2]) {
#if defined(CPU_CAPABILITY_AVX512)
  wide[0] = _mm512_maskz_cvtps_pd(-1, _mm512_castps512_ps256(v));
  wide[1] = _mm512_maskz_cvtps_pd(-1, _mm512_maskz_extractf32x8_ps(-1, v, 1));
#elif defined(CPU_CAPABILITY_AVX2)
  wide[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
  wide[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#else
  constexpr int half = Vec<double>::size();
  float lane[2 * half];
  double each[2 * half];
  v.store(lane);
  for (int k = 0; k < 2 * half; ++k) each[k] = lane[k];
  for (int k = 0; k < 2; ++k) wide[k] = Vec<double>::loadu(each + k * half);
#endif
}

// Reduces the lanes by f, half of them onto the other half at a time: one by one, each step would
// wait for the one before.
template <class V, class F>
FASTOPS_FN typename V::value_type reduce_lanes(const V& v, F f) {
  typename V::value_type lane[V::size()];
  v.store(lane);
#pragma GCC unroll 8
  for (int width = V::size() / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < width; ++k) lane[k] = f(lane[k], lane[k + width]);
  return lane[0];
}
// The sum of all lanes, in double.
template <int n>
FASTOPS_FN double sum_of_lanes(const Vec<double> (&v)[n]) {
  static_assert(n <= 2);
  return reduce_lanes(n == 2 ? v[0] + v[n - 1] : v[0], [](double a, double b) { return a + b; });
}
template <class V>
FASTOPS_FN double sum_of_lanes(const V& v) {
  Vec<double> wide[sizeof(double) / sizeof(typename V::value_type)];
  promote(v, wide);
  return sum_of_lanes(wide);
}

// load() and store() of memory that holds reals whatever the dtype is.
template <class L, class N>
FASTOPS_FN void load_real(const typename L::real* p, N count, typename L::V (&v)[L::count]) {
  using R = VecIO<typename L::real>;
  for (int k = 0; k < L::count; ++k) {
    typename R::V one[1] = {typename R::V(typename L::real(0))};
    const int64_t left = count - k * R::size;
    if (left > 0) R::load(p + k * R::size, left < R::size ? left : R::size, one);
    v[k] = one[0];
  }
}
template <class L, class N>
FASTOPS_FN void store_real(typename L::real* p, N count, const typename L::V (&v)[L::count]) {
  using R = VecIO<typename L::real>;
  for (int k = 0; k < L::count; ++k) {
    const typename R::V one[1] = {v[k]};
    const int64_t left = count - k * R::size;
    if (left > 0) R::store(p + k * R::size, left < R::size ? left : R::size, one);
  }
}

// Adds the first `count` lanes to the reals at p.
template <class L, class N>
FASTOPS_FN void add_real(typename L::real* p, N count, const typename L::V (&v)[L::count]) {
  typename L::V sum[L::count];
  load_real<L>(p, count, sum);
  for (int k = 0; k < L::count; ++k) sum[k] = sum[k] + v[k];
  store_real<L>(p, count, sum);
}

constexpr int64_t kStreamBytes = int64_t{24} << 20;  // of results that cannot stay in the caches

// Whether a result of n elements should be streamed: it is large, its vectors are aligned, and it
// is not in the caches already as an input.
template <class L, class scalar_t>
FASTOPS_FN bool streams(const scalar_t* out, int64_t n, const void* in) {
  return n * static_cast<int64_t>(sizeof(scalar_t)) >= kStreamBytes && out != in &&
         reinterpret_cast<uintptr_t>(out) % (L::size * sizeof(scalar_t)) == 0;
}
FASTOPS_FN void fence() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// Vectors that are summed before their sum is added to the total: one long chain of additions
// drifts where all terms are alike.
constexpr int kFew = 16;

// Calls body(begin, end) for the runs of kFew in [0, n).
template <class Body>
FASTOPS_FN void in_runs(int64_t n, Body body) {
  for (int64_t begin = 0; begin < n; begin += kFew)
    body(begin, begin + kFew < n ? begin + kFew : n);
}

// Calls body(i, n) for every `size` elements of [begin, end), n < size in the last call only.
// `hot`: whole vectors have a loop of their own in which n is a constant. That is twice the code,
// and up to twice as fast where the body is a few instructions.
template <int64_t size, bool hot = true, class Body>
FASTOPS_FN void for_each_vector(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  if constexpr (hot)
    for (; i + size <= end; i += size) body(i, std::integral_constant<int64_t, size>{});
  for (; i < end; i += size) body(i, end - i < size ? end - i : size);
}

// Calls f(inputs..., parameters...), the parameters as values of T.
template <class T, class real, size_t... I, class F, class... In>
FASTOPS_FN auto apply(F f, const real* params, std::index_sequence<I...>, In... in) {
  return f(in..., T(params[I])...);
}
template <int n, class T, class F, class real, class... In>
FASTOPS_FN auto with_params(F f, const real* params, In... in) {
  return apply<T>(f, params, std::make_index_sequence<n>{}, in...);
}

template <int n, class real>
struct Params {
  real value[n > 0 ? n : 1] = {};
  FASTOPS_FN explicit Params(const double* p) {
    for (int k = 0; k < n; ++k) value[k] = static_cast<real>(p[k]);
  }
};

template <class F>
FASTOPS_FN Error dispatch(c10::ScalarType dtype, F f) {
  switch (dtype) {
    case c10::ScalarType::Float:
      return f(float{});
    case c10::ScalarType::Double:
      return f(double{});
    case c10::ScalarType::Half:
      return f(c10::Half{});
    case c10::ScalarType::BFloat16:
      return f(c10::BFloat16{});
    default:
      return "unsupported dtype";
  }
}

// The kernels of a list of formulas.
template <class Kernel, template <class> class Make, class L>
struct Table;
template <class Kernel, template <class> class Make, class... Ops>
struct Table<Kernel, Make, List<Ops...>> {
  static constexpr Kernel kernels[] = {Make<Ops>::kernel...};
};

}  // namespace fastops::CPU_CAPABILITY
