// Random scalars: Philox 4x32-10, and rounding that is decided by them. Both depend on a seed and
// on the place of an element alone, whatever computes them. Written over U: uint32_t or a vector of
// them.
#pragma once
#include "../math.h"

namespace fastops {

// Four random words for the counter (c0, c1, c2, c3) under the key (k0, k1): Salmon et al.,
// "Parallel random scalars: as easy as 1, 2, 3" (SC 2011). Element i of a tensor owns word i % 4 of
// counter i / 4, which is (c0, c1).
template <class U>
struct Philox {
  U word[4];
  FASTOPS_FN Philox(U c0, U c1, uint32_t k0, uint32_t k1, uint32_t c2 = 0, uint32_t c3 = 0)
      : word{c0, c1, U(c2), U(c3)} {
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
      U high0(0u), low0(0u), high1(0u), low1(0u);
      wide_product(U(0xD2511F53u), word[0], high0, low0);
      wide_product(U(0xCD9E8D57u), word[2], high1, low1);
      word[0] = high1 ^ word[1] ^ U(k0);
      word[1] = low1;
      word[2] = high0 ^ word[3] ^ U(k1);
      word[3] = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

// Of one tensor's rounding at one step. What is stored of an element has a slot (the parameter 0,
// its states 1, 2, ...); two slots share the element's word of one counter, half of it each.
struct Noise {
  uint32_t k0, k1;  // the seed
  uint32_t step;
  uint32_t number;  // of the tensor among those under the seed
  template <class U>
  FASTOPS_FN Philox<U> words(U c0, U c1, int slot) const {
    return {c0, c1, k0, k1, number, 2 * step + static_cast<uint32_t>(slot) / 2};
  }
};

// The bfloat16 above or below a float32, with the probability of its distance to the other, so that
// the mean of the results is the float32 itself (Croci et al., "Stochastic rounding:
// implementation, error analysis and applications", 2022). bits: the float32's; result: the
// bfloat16's. An infinity stays one, and so does a NaN.
FASTOPS_FN uint32_t round_stochastically(uint32_t bits, uint32_t word, int slot) {
  const uint32_t noise = slot % 2 ? word >> 16 : word & 0xFFFFu;
  const uint32_t nan = 0u - (((bits & 0x7FFFFFFFu) + 0x007FFFFFu) >> 31);
  return ((bits + noise) >> 16) | (nan & 0x7FFFu);
}

}  // namespace fastops
