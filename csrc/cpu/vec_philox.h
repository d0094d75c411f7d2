// Vectors of 32-bit words, and the random words of consecutive elements. No formula.
#pragma once
#include "../formulas/philox.h"
#include "vec_io.h"

namespace fastops::CPU_CAPABILITY {
namespace {

// A vector of 32-bit words. interleave() turns the four words of `lanes` counters, vector by
// vector, into the order of the elements that own them; it wants lane l to hold the counter base +
// offset(l), which saves the cross-lane moves.
#if defined(CPU_CAPABILITY_AVX512)
struct U32 {
  static constexpr int lanes = 16;
  __m512i v;
  FASTOPS_FN U32(__m512i v) : v(v) {}
  FASTOPS_FN explicit U32(uint32_t x) : v(_mm512_set1_epi32(static_cast<int>(x))) {}
  static FASTOPS_FN U32 load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  FASTOPS_FN void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }
  friend FASTOPS_FN U32 operator^(U32 a, U32 b) { return _mm512_xor_si512(a.v, b.v); }
  friend FASTOPS_FN void wide_product(U32 a, U32 b, U32& high, U32& low) {
    const __m512i even = _mm512_mul_epu32(a.v, b.v),
                  odd = _mm512_mul_epu32(a.v, _mm512_srli_epi64(b.v, 32));
    high.v = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_ENUM(0xB1));
    low.v = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_ENUM(0xA0));
  }
  static FASTOPS_FN uint32_t offset(int lane) { return 4 * (lane % 4) + lane / 4; }
  static FASTOPS_FN void interleave(U32 (&w)[4]) {
    const __m512i a = _mm512_unpacklo_epi32(w[0].v, w[1].v),
                  b = _mm512_unpackhi_epi32(w[0].v, w[1].v);
    const __m512i c = _mm512_unpacklo_epi32(w[2].v, w[3].v),
                  d = _mm512_unpackhi_epi32(w[2].v, w[3].v);
    w[0].v = _mm512_unpacklo_epi64(a, c);
    w[1].v = _mm512_unpackhi_epi64(a, c);
    w[2].v = _mm512_unpacklo_epi64(b, d);
    w[3].v = _mm512_unpackhi_epi64(b, d);
  }
};
#elif defined(CPU_CAPABILITY_AVX2)
struct U32 {
  static constexpr int lanes = 8;
  __m256i v;
  FASTOPS_FN U32(__m256i v) : v(v) {}
  FASTOPS_FN explicit U32(uint32_t x) : v(_mm256_set1_epi32(static_cast<int>(x))) {}
  static FASTOPS_FN U32 load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  FASTOPS_FN void store(uint32_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  friend FASTOPS_FN U32 operator^(U32 a, U32 b) { return _mm256_xor_si256(a.v, b.v); }
  friend FASTOPS_FN void wide_product(U32 a, U32 b, U32& high, U32& low) {
    const __m256i even = _mm256_mul_epu32(a.v, b.v),
                  odd = _mm256_mul_epu32(a.v, _mm256_srli_epi64(b.v, 32));
    high.v = _mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xB1), odd, 0xAA);
    low.v = _mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xA0), 0xAA);
  }
  static FASTOPS_FN uint32_t offset(int lane) { return 2 * (lane % 4) + lane / 4; }
  static FASTOPS_FN void interleave(U32 (&w)[4]) {
    const __m256i a = _mm256_unpacklo_epi32(w[0].v, w[1].v),
                  b = _mm256_unpackhi_epi32(w[0].v, w[1].v);
    const __m256i c = _mm256_unpacklo_epi32(w[2].v, w[3].v),
                  d = _mm256_unpackhi_epi32(w[2].v, w[3].v);
    w[0].v = _mm256_unpacklo_epi64(a, c);
    w[1].v = _mm256_unpackhi_epi64(a, c);
    w[2].v = _mm256_unpacklo_epi64(b, d);
    w[3].v = _mm256_unpackhi_epi64(b, d);
  }
};
#else
struct U32 {
  static constexpr int lanes = 8;
  uint32_t v[lanes];
  FASTOPS_FN U32() {}
  FASTOPS_FN explicit U32(uint32_t x) {
    for (auto& lane : v) lane = x;
  }
  static FASTOPS_FN U32 load(const uint32_t* p) {
    U32 r;
    for (int k = 0; k < lanes; ++k) r.v[k] = p[k];
    return r;
  }
  FASTOPS_FN void store(uint32_t* p) const {
    for (int k = 0; k < lanes; ++k) p[k] = v[k];
  }
  friend FASTOPS_FN U32 operator^(U32 a, U32 b) {
    for (int k = 0; k < lanes; ++k) a.v[k] ^= b.v[k];
    return a;
  }
  friend FASTOPS_FN void wide_product(U32 a, U32 b, U32& high, U32& low) {
    for (int k = 0; k < lanes; ++k) fastops::wide_product(a.v[k], b.v[k], high.v[k], low.v[k]);
  }
  static FASTOPS_FN uint32_t offset(int lane) { return lane; }
  static FASTOPS_FN void interleave(U32 (&w)[4]) {
    uint32_t flat[4 * lanes];
    for (int k = 0; k < lanes; ++k)
      for (int j = 0; j < 4; ++j) flat[4 * k + j] = w[j].v[k];
    for (int j = 0; j < 4; ++j) w[j] = load(flat + lanes * j);
  }
};
#endif

constexpr int kSpan = 4 * U32::lanes;  // elements whose words come of one vector of counters

FASTOPS_FN U32 lane_offsets() {
  uint32_t lane[U32::lanes];
  for (int l = 0; l < U32::lanes; ++l) lane[l] = U32::offset(l);
  return U32::load(lane);
}

// The words of elements [i, i + kSpan) in row-major order; i is a multiple of kSpan. make(c0, c1)
// makes the Philox.
template <class Make>
FASTOPS_FN void contiguous_words(Make make, U32 offsets, int64_t i, uint32_t* word) {
  const uint64_t counter = static_cast<uint64_t>(i) / 4;
  // counter is a multiple of `lanes`, so adding a lane's offset never carries into the high half
  Philox<U32> philox = make(offsets ^ U32(static_cast<uint32_t>(counter)),
                            U32(static_cast<uint32_t>(counter >> 32)));
  U32::interleave(philox.word);
  for (int j = 0; j < 4; ++j) philox.word[j].store(word + j * U32::lanes);
}

}  // namespace
}  // namespace fastops::CPU_CAPABILITY
