// Elementwise losses: value(x, t), and its derivatives d0 to the input and d1 to the target, which
// the loop multiplies by `slope`, where a formula has one. What `params` declares, scalars and
// tensors, stands behind x and t. The reduction is the loop's affair; second derivatives are taken
// of d0 and d1 by Dual, see second_derivative().
#pragma once
#include "../math.h"
#include "pair.h"

namespace fastops {

struct MSE {
  static constexpr const char *name = "mse_loss", *params = "";
  static constexpr double slope =
      2;  // twice a large difference would be inf where twice its share of the mean is not
  template <class T>
  static FASTOPS_FN T value(T x, T t) {
    return (x - t) * (x - t);
  }
  template <class T>
  static FASTOPS_FN T d0(T x, T t) {
    return x - t;
  }
  template <class T>
  static FASTOPS_FN T d1(T x, T t) {
    return t - x;
  }
};

struct L1 {
  static constexpr const char *name = "l1_loss", *params = "";
  static constexpr bool saves_slope = true;
  template <class T>
  static FASTOPS_FN T value(T x, T t) {
    return abs(x - t);
  }
  template <class T>
  static FASTOPS_FN T d0(T x, T t) {
    return select(x > t, c<T>(1), select(x < t, c<T>(-1), c<T>(0)));
  }
  template <class T>
  static FASTOPS_FN T d1(T x, T t) {
    return -d0(x, t);
  }
};

// Girshick, 2015.
struct SmoothL1 {
  static constexpr const char *name = "smooth_l1_loss", *params = "float beta=1.0";
  template <class T>
  static FASTOPS_FN T value(T x, T t, T beta) {
    const T d = abs(x - t);
    return select(d < beta, c<T>(0.5) * d * (d / beta), d - c<T>(0.5) * beta);
  }
  template <class T>
  static FASTOPS_FN T d0(T x, T t, T beta) {
    const T d = x - t;
    return select(d <= -beta, c<T>(-1), select(d >= beta, c<T>(1), d / beta));
  }
  template <class T>
  static FASTOPS_FN T d1(T x, T t, T beta) {
    return -d0(x, t, beta);
  }
};

// Huber, 1964.
struct Huber {
  static constexpr const char *name = "huber_loss", *params = "float delta=1.0";
  template <class T>
  static FASTOPS_FN T value(T x, T t, T delta) {
    const T d = abs(x - t);
    return select(d <= delta, c<T>(0.5) * d * d, delta * (d - c<T>(0.5) * delta));
  }
  template <class T>
  static FASTOPS_FN T d0(T x, T t, T delta) {
    const T d = x - t;
    return select(d <= -delta, -delta, select(d >= delta, delta, d));
  }
  template <class T>
  static FASTOPS_FN T d1(T x, T t, T delta) {
    return -d0(x, t, delta);
  }
};

// Cross-entropy of Bernoulli distributions. Logarithms are kept above -100, and what divides the
// gradient above 1e-12, as torch keeps them. An input or a target outside [0, 1] gives a NaN.
struct BCE {
  static constexpr const char *name = "binary_cross_entropy", *params = "";
  static constexpr bool linear_in_target = true;
  static constexpr double low = 0, high = 1;
  template <class T>
  static FASTOPS_FN T value(T x, T t) {
    const auto [of, of_rest] = logs(x);
    const T v = (t - c<T>(1)) * larger(c<T>(-100), of_rest) - t * larger(c<T>(-100), of);
    const T none = c<T>(std::numeric_limits<double>::quiet_NaN());
    return select(t >= c<T>(0), select(t <= c<T>(1), v, none), none);
  }
  template <class T>
  static FASTOPS_FN T d0(T x, T t) {
    return (x - t) / max((c<T>(1) - x) * x, c<T>(1e-12));
  }
  template <class T>
  static FASTOPS_FN T d1(T x, T) {
    const auto [of, of_rest] = logs(x);
    return of_rest - of;
  }
  // A Dual of d0 is the small difference of two large terms, where x is near 0 or 1.
  template <class T>
  static FASTOPS_FN T d00(T x, T t) {
    const T low = max(x, c<T>(1e-12)), high = max(c<T>(1) - x, c<T>(1e-12));
    return t / (low * low) + (c<T>(1) - t) / (high * high);
  }
};

// The same of sigmoid(x), from its logit x.
struct BCEWithLogits {
  static constexpr const char *name = "binary_cross_entropy_with_logits", *params = "";
  static constexpr bool linear_in_target = true;
  template <class T>
  static FASTOPS_FN T value(T x, T t) {
    return (c<T>(1) - t) * x - log_sigmoid(x);
  }
  template <class T>
  static FASTOPS_FN T d0(T x, T t) {
    return log_sigmoid_slope(-x) - t;  // the sigmoid less t
  }
  template <class T>
  static FASTOPS_FN T d1(T x, T) {
    return -x;
  }
};

// The same with the share of the positive examples, -t log(sigmoid(x)), times w.
struct BCEWithLogitsPosWeight {
  static constexpr const char *name = "binary_cross_entropy_with_logits_pos_weight",
                              *params = "Tensor pos_weight";
  static constexpr bool linear_in_target = true;
  template <class T>
  static FASTOPS_FN T value(T x, T t, T w) {
    return (c<T>(1) - t) * x - share(t, w) * log_sigmoid(x);
  }
  template <class T>
  static FASTOPS_FN T d0(T x, T t, T w) {
    return share(t, w) * log_sigmoid_slope(-x) - w * t;
  }
  template <class T>
  static FASTOPS_FN T d1(T x, T, T w) {
    return log_sigmoid(-x) - w * log_sigmoid(x);
  }
  template <class T>
  static FASTOPS_FN T share(T t, T w) {
    return c<T>(1) + (w - c<T>(1)) * t;
  }
};

// What a loss takes as input and target: all scalars, unless it says otherwise.
struct Domain {
  double low = -std::numeric_limits<double>::infinity(),
         high = std::numeric_limits<double>::infinity();
};
template <class Op>
constexpr Domain domain_of() {
  if constexpr (requires { Op::low; }) {
    return {Op::low, Op::high};
  } else {
    return {};
  }
}

// Whether forward saves d0 = -d1, which is constant in pieces, and not the two tensors: torch saves
// their difference, so that they may be overwritten before backward.
template <class Op>
constexpr bool saves_slope() {
  return requires { Op::saves_slope; };
}

// The value and d0, of one visit.
template <class Op, class T, class... P>
FASTOPS_FN Pair<T> value_and_slope(T x, T t, P... p) {
  return {Op::value(x, t, p...), Op::d0(x, t, p...)};
}

template <class Op>
constexpr double slope_of() {
  if constexpr (requires { Op::slope; }) return Op::slope;
  return 1;
}

// The second derivative of the value, to x twice (to_target = 0: d00, where a formula has one), to
// x and t (1), or to t twice (2). The last is 0 of what is `linear_in_target`, and is not computed:
// where a logarithm is infinite it would be 0 times that.
template <class Op, class T, class... P>
FASTOPS_FN T second_derivative(int to_target, T x, T t, P... p) {
  using D = Dual<T>;
  if constexpr (requires { Op::linear_in_target; })
    if (to_target == 2) return c<T>(0);
  if constexpr (requires { Op::d00(x, t); })
    if (to_target == 0) return Op::d00(x, t);
  const D by_x(x, to_target == 0 ? c<T>(1) : c<T>(0)), by_t(t, to_target == 0 ? c<T>(0) : c<T>(1));
  return to_target == 2 ? Op::d1(by_x, by_t, D(p, c<T>(0))...).d
                        : Op::d0(by_x, by_t, D(p, c<T>(0))...).d;
}

using Losses = List<MSE, L1, SmoothL1, Huber, BCE, BCEWithLogits, BCEWithLogitsPosWeight>;

}  // namespace fastops
