// Dropout and its random numbers: Philox 4x32-10 keyed by (seed, logical element index), so that the mask is the same
// on every back end, thread count, instruction set and memory layout. Written over U: uint32_t or a vector of them.
#pragma once
#include "activations.h"

namespace fastops {

// Four random words for the counter (c0, c1, 0, 0) under the key (k0, k1): Salmon et al., "Parallel random numbers: as
// easy as 1, 2, 3" (SC 2011). Element i of a tensor owns word i % 4 of counter i / 4.
template <class U>
struct Philox {
  U word[4];
  FASTOPS_FN Philox(U c0, U c1, uint32_t k0, uint32_t k1) : word{c0, c1, U(0u), U(0u)} {
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

// An element is dropped when its word is below threshold = round(p 2^32); p = 1 never reaches a kernel.
struct Dropout {
  static constexpr const char* name = "dropout";
  static constexpr int inputs = 1;
  static constexpr bool from_output = false;
  template <class T, class Mask>
  static FASTOPS_FN T forward(Mask keep, T scale, T x) {
    return select(keep, x * scale, c<T>(0));
  }
};

struct ReLUDropout {
  static constexpr const char* name = "relu_dropout";
  static constexpr int inputs = 1;
  static constexpr bool from_output = true;  // what was dropped is 0, as what was not positive
  template <class T, class Mask>
  static FASTOPS_FN T forward(Mask keep, T scale, T x) {
    return Dropout::forward(keep, scale, ReLU::forward(x));
  }
  template <class T>
  static FASTOPS_FN T backward(T y, T dy, T scale) {
    return ReLU::backward(y, dy * scale);
  }
};

struct BiasDropoutAdd {
  static constexpr const char* name = "bias_dropout_add";
  static constexpr int inputs = 3;  // x, a row that is repeated, and a residual
  static constexpr bool from_output = false;
  template <class T, class Mask>
  static FASTOPS_FN T forward(Mask keep, T scale, T x, T bias, T residual) {
    return residual + Dropout::forward(keep, scale, x + bias);
  }
};

using Dropouts = List<Dropout, ReLUDropout, BiasDropoutAdd>;

}  // namespace fastops
