// Normalization: the moments of a sample and how two samples' are merged, the normalized value, and
// its gradients. How sums are taken is the loop's affair.
#pragma once
#include "activations.h"

namespace fastops {

// The mean and the sum of squared deviations of a sample (Chan, Golub and LeVeque, 1979).
template <class T>
struct Moments {
  T mean, m2;

  // Adds `count` values of which the sums of (x - origin) and (x - origin)^2 are given to `n` that
  // are here already. `share` = count / (n + count), `weight` = n share.
  FASTOPS_FN void merge_sums(T origin, T sum, T squares, T inverse_count, T share, T weight) {
    const T shift = sum * inverse_count;
    merge(origin + shift, squares - sum * shift, share, weight);
  }
  FASTOPS_FN void merge(T other_mean, T other_m2, T share, T weight) {
    const T delta = other_mean - mean;
    mean = mean + delta * share;
    m2 = m2 + (other_m2 + delta * delta * weight);
  }
};

struct BatchNorm {
  // `scale` is weight / sqrt(variance + eps). The mean is subtracted first: beside it, x may have
  // few digits of its own.
  template <class T>
  static FASTOPS_FN T forward(T x, T mean, T scale, T bias) {
    return (x - mean) * scale + bias;
  }
  // mean_dz and slope are the means of dz and of dz (x - mean) / variance.
  template <class T>
  static FASTOPS_FN T backward(T dz, T deviation, T scale, T mean_dz, T slope) {
    return (dz - mean_dz - deviation * slope) * scale;
  }
};

// The same of a row, whose elements have weights of their own: forward() is given what is left of x
// once the rounded mean is subtracted, and what the mean lost when it was rounded; backward() dy
// weight and the normalized x, with 1 / sqrt(variance + eps) as the scale. RMS norm is that of a
// mean of 0.
using RowNorm = BatchNorm;

}  // namespace fastops
