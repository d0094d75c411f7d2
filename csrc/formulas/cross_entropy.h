// Cross-entropy of a row against a class, two classes or a distribution: the loss, its gradient,
// and what a loop has to add up for them. The running log-sum-exp is softmax.h's.
#pragma once
#include "softmax.h"

namespace fastops {

// What the loops over a row end with.
template <class T>
struct CrossEntropyRow {
  T loss, lse;  // lse: log(sum(exp(x)))
  T inverse;    // softmax(x)[j] is exp(x[j] - peak) times this
  T total;      // of CrossEntropy::gradient
};

// Cross-entropy of a row x against the distribution q with q[j] = hard [j == target] + soft w[j],
// where hard = (1 - label_smoothing) w[target] and soft = label_smoothing / classes; w is 1 where
// no weight is given.
struct CrossEntropy {
  static constexpr const char* name = "cross_entropy";
  // The end of every loop. What the row is compared with, whatever that is, has mass = sum(q) and
  // depth = sum(q (peak - x)): distances from the peak, not logits, are what is added, so that
  // large logits cost no digits. z is the factor of z_loss, or 0.
  template <class T>
  static FASTOPS_FN CrossEntropyRow<T> row(LogSumExp<T> of, T depth, T mass, Real<T> z) {
    return row(of.peak, log(of.sum), c<T>(1) / of.sum, depth, mass, z);
  }
  // The same of log_sum = log(sum(exp(x - peak))), for loops that have it in double.
  template <class T>
  static FASTOPS_FN CrossEntropyRow<T> row(T peak, T log_sum, T inverse, T depth, T mass,
                                           Real<T> z) {
    const T lse = peak + log_sum;
    CrossEntropyRow<T> row{depth + mass * log_sum, lse, inverse, mass};
    if (z != 0) {  // 0 times the square may be NaN
      row.loss = row.loss + z_loss(lse, T(z));
      row.total = row.total + z_slope(lse, T(z));
    }
    return row;
  }
  // log_sum is log(sum(exp(x - peak))). With label smoothing (soft != 0) only: `depth` is sum(w[j]
  // (peak - x[j])) and `mass` sum(w[j]). Distances from the peak, not logits, are what is added:
  // large logits cost no digits.
  template <class T>
  static FASTOPS_FN T loss(T log_sum, T peak, T x_target, T hard) {
    return hard * (peak - x_target + log_sum);
  }
  template <class T>
  static FASTOPS_FN T smooth_loss(T log_sum, T depth, T mass, T soft) {
    return soft * (depth + mass * log_sum);
  }
  // What z_loss, a factor, adds to a row's loss (Chowdhery et al., 2022, section 5), and how
  // steeply that rises with lse, the row's log(sum(exp(x))), whose own derivative is p: it belongs
  // to `total` below.
  template <class T>
  static FASTOPS_FN T z_loss(T lse, T z) {
    return z * lse * lse;
  }
  template <class T>
  static FASTOPS_FN T z_slope(T lse, T z) {
    return c<T>(2) * z * lse;
  }
  // d loss / d x[j] for j != target, with p = softmax(x)[j], soft_weight = soft w[j], and total the
  // mass and what z_loss adds to it; at the target it is less by `hard`.
  template <class T>
  static FASTOPS_FN T gradient(T p, T total, T soft_weight) {
    return p * total - soft_weight;
  }
};

// What a row's loss needs of its target distribution w[j] q[j], whatever that is: mass = sum(w q)
// and depth = sum(w q (base - x)), where the base is moved as the running maximum is.
template <class T>
struct Expectation {
  T mass = c<T>(0), depth = c<T>(0), base = c<T>(0);
  FASTOPS_FN void move(T to) {
    depth = depth + mass * (to - base);
    base = to;
  }
  FASTOPS_FN void add(T q, T x) {
    mass = mass + q;
    depth = depth + q * (base - x);
  }
};

using CrossEntropies = List<CrossEntropy>;

}  // namespace fastops
