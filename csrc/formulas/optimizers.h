// Optimizers: one struct each. derive() makes the numbers of one step of one tensor from the options and the step count;
// step() updates a parameter p and its states s from a gradient g with them. The order of operations is that of
// torch.optim's for-loop.
#pragma once
#include "../math.h"

namespace fastops {

// a + weight (b - a), from the end that is nearer, as torch.lerp.
template <class T, class real>
FASTOPS_FN T lerp(T a, T b, real weight) {
  if (weight < real(0.5)) return a + T(weight) * (b - a);
  return b - (b - a) * T(real(1) - weight);
}

// Adam (Kingma and Ba, 2014), AdamW with decoupled weight decay (Loshchilov and Hutter, 2017), and with AMSGrad the
// running maximum of the second moment (Reddi et al., 2018) as a third state.
template <bool amsgrad>
struct Adam {
  static constexpr const char* name = amsgrad ? "adam_amsgrad" : "adam";
  static constexpr const char* options =
      "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize=False, "
      "bool decoupled_weight_decay=False";
  static constexpr const char* state_names = amsgrad ? "exp_avg exp_avg_sq max_exp_avg_sq" : "exp_avg exp_avg_sq";
  static constexpr bool counts = true;
  static constexpr int states = amsgrad ? 3 : 2;
  static constexpr int numbers = 9;

  template <class real>
  struct Numbers {
    real sign;              // -1 to maximize
    real weight_decay;      // coupled: added to the gradient
    real keep;              // decoupled: 1 - lr weight_decay
    real one_minus_beta1;
    real beta2;
    real one_minus_beta2;
    real step_size;         // lr / (1 - beta1^step)
    real correction2_sqrt;  // sqrt(1 - beta2^step)
    real eps;
  };

  static FASTOPS_FN Numbers<double> derive(const double* o, double step, bool /*first*/) {
    const double lr = o[0], beta1 = o[1], beta2 = o[2], weight_decay = o[4];
    const bool maximize = o[5] != 0, decoupled = o[6] != 0;
    return {.sign = maximize ? -1.0 : 1.0,
            .weight_decay = decoupled ? 0.0 : weight_decay,
            .keep = decoupled ? 1.0 - lr * weight_decay : 1.0,
            .one_minus_beta1 = 1.0 - beta1,
            .beta2 = beta2,
            .one_minus_beta2 = 1.0 - beta2,
            .step_size = lr / (1.0 - ::pow(beta1, step)),
            .correction2_sqrt = ::sqrt(1.0 - ::pow(beta2, step)),
            .eps = o[3]};
  }

  template <class real, class T>
  static FASTOPS_FN void step(const Numbers<real>& n, T& p, T g, T (&s)[states]) {
    g = g * T(n.sign);
    if (n.weight_decay != real(0)) g = g + T(n.weight_decay) * p;
    if (n.keep != real(1)) p = p * T(n.keep);
    s[0] = lerp(s[0], g, n.one_minus_beta1);
    s[1] = s[1] * T(n.beta2) + T(n.one_minus_beta2) * g * g;
    T second = s[1];
    if constexpr (amsgrad) second = s[2] = max(s[2], s[1]);
    p = p - T(n.step_size) * s[0] / (sqrt(second) / T(n.correction2_sqrt) + T(n.eps));
  }
};

using Optimizers = List<Adam<false>, Adam<true>>;

}  // namespace fastops
