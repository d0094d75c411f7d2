// Cross-entropy of a row against a class, two classes or a distribution: the loss, its gradient,
// and what a loop has to add up for them. The running log-sum-exp is softmax.h's.
#pragma once
#include "softmax.h"

namespace fastops {

// Cross-entropy of a row x against the distribution q with q[j] = hard [j == target] + soft w[j],
// where hard = (1 - label_smoothing) w[target] and soft = label_smoothing / classes; w is 1 where
// no weight is given.
struct CrossEntropy {
  static constexpr const char* name = "cross_entropy";
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

// The end of a row, for every loop: what the row is compared with is added part by part.
template <class T>
struct CrossEntropyRow {
  T log_sum;  // log(sum(exp(x - peak)))
  T lse;      // log(sum(exp(x)))
  T inverse;  // softmax(x)[j] is exp(x[j] - peak) times this
  T loss = c<T>(0);
  T total = c<T>(0);  // of CrossEntropy::gradient

  FASTOPS_FN CrossEntropyRow(T peak, T log_sum, T inverse)
      : log_sum(log_sum), lse(peak + log_sum), inverse(inverse) {}
  explicit FASTOPS_FN CrossEntropyRow(LogSumExp<T> of)
      : CrossEntropyRow(of.peak, log(of.sum), c<T>(1) / of.sum) {}

  // `by` times the cross-entropy against q, with mass = sum(q) and depth = sum(q (peak - x)):
  // distances from the peak, not logits, are what is added, so that large logits cost no digits.
  // `part` is by mass.
  FASTOPS_FN void add(T by, T depth, T mass, T part) {
    loss = loss + by * (depth + mass * log_sum);
    total = total + part;
  }
  FASTOPS_FN void add(T by, T depth, T mass) { add(by, depth, mass, by * mass); }
  FASTOPS_FN void add_z_loss(Real<T> z) {
    T slope = c<T>(0);
    if (z != Real<T>(0)) {  // 0 times the square may be NaN
      loss = loss + CrossEntropy::z_loss(lse, T(z));
      slope = CrossEntropy::z_slope(lse, T(z));
    }
    total = total + slope;
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
