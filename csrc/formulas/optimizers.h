// Optimizers: one struct each, made of the numbers of one step of one tensor, already corrected for the step count;
// step() updates a parameter p and its states s from a gradient g. The order of operations is torch.optim's for-loop's.
#pragma once
#include "../math.h"

namespace fastops {

// Adam (Kingma and Ba, 2014), AdamW with decoupled weight decay (Loshchilov and Hutter, 2017), and with AMSGrad the
// running maximum of the second moment (Reddi et al., 2018) as a third state.
template <bool amsgrad>
struct Adam {
  static constexpr const char* name = amsgrad ? "adam_amsgrad" : "adam";
  static constexpr int states = amsgrad ? 3 : 2;  // exp_avg, exp_avg_sq, max_exp_avg_sq
  static constexpr int numbers = 9;

  // The numbers, in this order, as `step_size` etc. are derived from lr and the step count by the caller.
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

  template <class real, class T>
  static FASTOPS_FN void step(const Numbers<real>& n, T& p, T g, T (&s)[states]) {
    g = g * T(n.sign);
    if (n.weight_decay != real(0)) g = g + T(n.weight_decay) * p;
    if (n.keep != real(1)) p = p * T(n.keep);
    s[0] = s[0] + T(n.one_minus_beta1) * (g - s[0]);
    s[1] = s[1] * T(n.beta2) + T(n.one_minus_beta2) * g * g;
    T second = s[1];
    if constexpr (amsgrad) second = s[2] = max(s[2], s[1]);
    p = p - T(n.step_size) * s[0] / (sqrt(second) / T(n.correction2_sqrt) + T(n.eps));
  }
};

using Optimizers = List<Adam<false>, Adam<true>>;

}  // namespace fastops
