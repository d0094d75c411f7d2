// Softmax and what follows from it: the running (maximum, sum of exponentials) of a row, and the
// epilogues of softmax, log-softmax and cross-entropy, forward and backward. How a row is walked
// and joined is the loop's affair.
#pragma once
#include "../math.h"

namespace fastops {

// log(sum(exp(x))) of what was seen so far, as (peak, sum of exp(x - peak)). merge() is
// associative: lanes, threads and blocks all combine with it. A peak of -inf (nothing, or only
// -inf, seen) counts as 0 in the exponent, so that exp(-inf - -inf) cannot make a NaN of an empty
// half.
template <class T>
struct LogSumExp {
  T peak = c<T>(-std::numeric_limits<double>::infinity());
  T sum = c<T>(0);

  static FASTOPS_FN T origin(T peak) {
    return select(peak > c<T>(std::numeric_limits<Real<T>>::lowest()), peak,
                  select(peak < c<T>(0), c<T>(0), peak));  // the inner select keeps a NaN
  }
  FASTOPS_FN LogSumExp merge(LogSumExp o) const {
    const T m = max(peak, o.peak), base = origin(m);
    return {m, sum * exp(peak - base) + o.sum * exp(o.peak - base)};
  }
  FASTOPS_FN T log_sum() const { return peak + log(sum); }
};

// forward(v, peak, k): v is exp(x - peak) where from_exponential (a loop that has it at hand need
// not take it again) and x elsewhere; k = constant(sum) of the row. backward(y, dy, total): total
// is the row's sum of summand(y, dy); where it `cancels`, little may be left of large terms but
// their rounding.
struct Softmax {
  static constexpr const char* name = "softmax";
  static constexpr bool is_log = false;
  static constexpr bool cancels = false;
  static constexpr bool from_exponential = true;
  template <class T>
  static FASTOPS_FN T constant(T sum) {
    return c<T>(1) / sum;
  }
  template <class T>
  static FASTOPS_FN T forward(T e, T, T k) {
    return e * k;
  }
  template <class T>
  static FASTOPS_FN T summand(T y, T dy) {
    return y * dy;
  }
  template <class T>
  static FASTOPS_FN T backward(T y, T dy, T total) {
    return y * (dy - total);
  }
};

struct LogSoftmax {
  static constexpr const char* name = "log_softmax";
  static constexpr bool is_log = true;
  static constexpr bool cancels = true;
  static constexpr bool from_exponential = false;
  template <class T>
  static FASTOPS_FN T constant(T sum) {
    return log(sum);
  }
  template <class T>
  static FASTOPS_FN T forward(T x, T peak, T k) {
    return x - peak - k;
  }
  template <class T>
  static FASTOPS_FN T summand(T, T dy) {
    return dy;
  }
  template <class T>
  static FASTOPS_FN T backward(T y, T dy, T total) {
    return dy - exp(y) * total;
  }
};

using Softmaxes = List<Softmax, LogSoftmax>;

}  // namespace fastops
