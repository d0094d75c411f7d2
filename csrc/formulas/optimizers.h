// Optimizers: one struct each. scalars_for_step() makes the scalars of one step of one tensor from
// the options and the scalar states; step() updates a parameter p and its states s from a gradient
// g with them. The order of operations is that of torch.optim's for-loop.
//
// What a formula declares is all that the other layers know of it: `options` become the arguments
// of an op and are read from a parameter group by name, `state_names` and `scalar_state_names` are
// the keys of its states.
#pragma once
#include "../math.h"

namespace fastops {

// a + weight (b - a), from the end that is nearer, as torch.lerp.
template <class T, class real>
FASTOPS_FN T lerp(T a, T b, real weight) {
  if (weight < real(0.5)) return a + T(weight) * (b - a);
  return b - (b - a) * T(real(1) - weight);
}

// The arrays that a loop keeps states in have a place even where there are no states.
template <class Op>
constexpr int state_slots = Op::states > 0 ? Op::states : 1;

// L1 regularisation by its subgradient, l1 sign(p), which is added to the gradient.
template <class T>
FASTOPS_FN T subgradient(T p, T l1) {
  return select(p > c<T>(0), l1, select(p < c<T>(0), -l1, c<T>(0)));
}
// The same by its proximal operator, soft thresholding: what lies within `threshold` of 0 becomes
// 0, the rest moves towards 0 by as much. (Parikh and Boyd, "Proximal algorithms", 2014, 6.5.2;
// with the threshold scaled per coordinate as the step of an adaptive method is: Yun, Lozano and
// Yang, "Adaptive proximal gradient methods", NeurIPS 2021.)
template <class T>
FASTOPS_FN T soft_threshold(T p, T threshold) {
  return select(p > threshold, p - threshold, select(p < -threshold, p + threshold, p * c<T>(0)));
}

// What every formula does to a gradient before it uses it, and to a parameter in the end.
template <class real>
struct Regularization {
  real sign;          // -1 to maximize
  real weight_decay;  // coupled: added to the gradient
  real l1;            // subgradient: added to the gradient
  real threshold;     // proximal: lr l1
};
FASTOPS_FN Regularization<double> regularization(double lr, double weight_decay, double maximize,
                                                 double l1, double proximal) {
  return {.sign = maximize != 0 ? -1.0 : 1.0,
          .weight_decay = weight_decay,
          .l1 = proximal != 0 ? 0.0 : l1,
          .threshold = proximal != 0 ? lr * l1 : 0.0};
}
template <class real, class T>
FASTOPS_FN T regularized(const Regularization<real>& r, T p, T g) {
  g = g * T(r.sign);
  if (r.weight_decay != real(0)) g = g + T(r.weight_decay) * p;
  if (r.l1 != real(0)) g = g + subgradient(p, T(r.l1));
  return g;
}
// A step that is divided by `scale` has its threshold divided by it too.
template <class real, class T>
FASTOPS_FN T thresholded(const Regularization<real>& r, T p, T scale) {
  return r.threshold != real(0) ? soft_threshold(p, T(r.threshold) / scale) : p;
}
template <class real, class T>
FASTOPS_FN T thresholded(const Regularization<real>& r, T p) {
  return r.threshold != real(0) ? soft_threshold(p, T(r.threshold)) : p;
}

// The numbers in a state beside its tensors: the step count, which has been counted up, and what
// else scalar_state_names lists. A number is rounded to the dtype that it is kept in as it is
// written.
struct ScalarStates {
  double* value;
  unsigned in_double;  // bit k: number k is kept as a double, not as a float
  FASTOPS_FN double step() const { return value[0]; }
  FASTOPS_FN double operator[](int k) const { return value[k]; }
  FASTOPS_FN void set(int k, double v) const {
    value[k] = in_double >> k & 1 ? v : static_cast<double>(static_cast<float>(v));
  }
  FASTOPS_FN void multiply(int k, double factor) const {
    value[k] = in_double >> k & 1
                   ? value[k] * factor
                   : static_cast<double>(static_cast<float>(value[k]) * static_cast<float>(factor));
  }
};

// Adam (Kingma and Ba, 2014), AdamW with decoupled weight decay (Loshchilov and Hutter, 2017), and
// with AMSGrad the running maximum of the second moment (Reddi et al., 2018) as a third state.
template <bool amsgrad>
struct Adam {
  static constexpr const char* name = amsgrad ? "adam_amsgrad" : "adam";
  static constexpr const char* options =
      "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize=False, "
      "bool decoupled_weight_decay=False, float l1=0.0, bool proximal=False";
  static constexpr const char* state_names =
      amsgrad ? "exp_avg exp_avg_sq max_exp_avg_sq" : "exp_avg exp_avg_sq";
  static constexpr const char* scalar_state_names = "step";
  static constexpr int states = amsgrad ? 3 : 2;

  template <class real>
  struct StepScalars {
    Regularization<real> regularization;
    real keep;  // decoupled: 1 - lr weight_decay
    real one_minus_beta1;
    real beta2;
    real one_minus_beta2;
    real step_size;         // lr / (1 - beta1^step)
    real correction2_sqrt;  // sqrt(1 - beta2^step)
    real eps;
  };

  static FASTOPS_FN StepScalars<double> scalars_for_step(const double* o, ScalarStates state,
                                                         bool /*first*/) {
    const double lr = o[0], beta1 = o[1], beta2 = o[2], weight_decay = o[4], step = state.step();
    const bool decoupled = o[6] != 0;
    return {.regularization =
                fastops::regularization(lr, decoupled ? 0.0 : weight_decay, o[5], o[7], o[8]),
            .keep = decoupled ? 1.0 - lr * weight_decay : 1.0,
            .one_minus_beta1 = 1.0 - beta1,
            .beta2 = beta2,
            .one_minus_beta2 = 1.0 - beta2,
            .step_size = lr / (1.0 - ::pow(beta1, step)),
            .correction2_sqrt = ::sqrt(1.0 - ::pow(beta2, step)),
            .eps = o[3]};
  }

  template <class real, class T>
  static FASTOPS_FN void step(const StepScalars<real>& n, T& p, T g, T (&s)[states]) {
    g = regularized(n.regularization, p, g);
    if (n.keep != real(1)) p = p * T(n.keep);
    s[0] = lerp(s[0], g, n.one_minus_beta1);
    s[1] = s[1] * T(n.beta2) + T(n.one_minus_beta2) * g * g;
    T second = s[1];
    if constexpr (amsgrad) second = s[2] = max(s[2], s[1]);
    const T scale = sqrt(second) / T(n.correction2_sqrt) + T(n.eps);
    p = p - T(n.step_size) * s[0] / scale;
    p = thresholded(n.regularization, p, scale);
  }
};

// Stochastic gradient descent, and with momentum (Sutskever et al., 2013) as torch defines it: the
// first buffer is the gradient itself.
template <bool with_momentum>
struct SGD {
  static constexpr const char* name = with_momentum ? "sgd_momentum" : "sgd";
  static constexpr const char* options =
      "float lr, float momentum, float dampening, float weight_decay, bool nesterov=False, bool "
      "maximize=False, "
      "float l1=0.0, bool proximal=False";
  static constexpr const char* state_names = with_momentum ? "momentum_buffer" : "";
  static constexpr const char* scalar_state_names = "";
  static constexpr int states = with_momentum ? 1 : 0;

  template <class real>
  struct StepScalars {
    Regularization<real> regularization;
    real lr;
    real momentum;
    real fresh;     // what of the gradient goes into the buffer: 1 - dampening, at first all of it
    real nesterov;  // momentum, or 0
  };

  static FASTOPS_FN StepScalars<double> scalars_for_step(const double* o, ScalarStates,
                                                         bool first) {
    return {
        .regularization = fastops::regularization(o[0], o[3], o[5], o[6], o[7]),
        .lr = o[0],
        .momentum =
            first ? 0.0 : o[1],  // also where a parameter that is listed twice has its first two
        .fresh = first ? 1.0 : 1.0 - o[2],
        .nesterov = o[4] != 0 ? o[1] : 0.0};
  }

  template <class real, class T>
  static FASTOPS_FN void step(const StepScalars<real>& n, T& p, T g, T (&s)[state_slots<SGD>]) {
    g = regularized(n.regularization, p, g);
    if constexpr (with_momentum) {
      s[0] = s[0] * T(n.momentum) + T(n.fresh) * g;
      g = n.nesterov != real(0) ? g + T(n.nesterov) * s[0] : s[0];
    }
    p = p - T(n.lr) * g;
    p = thresholded(n.regularization, p);
  }
};

// RMSprop (Tieleman and Hinton, 2012), with momentum, and centered (Graves, 2013): the variance for
// the second moment.
template <bool with_momentum, bool centered>
struct RMSprop {
  static constexpr const char* name =
      centered ? (with_momentum ? "rmsprop_centered_momentum" : "rmsprop_centered")
               : (with_momentum ? "rmsprop_momentum" : "rmsprop");
  static constexpr const char* options =
      "float lr, float alpha, float eps, float weight_decay, float momentum, bool maximize=False, "
      "float l1=0.0, "
      "bool proximal=False";
  static constexpr const char* state_names =
      centered ? (with_momentum ? "square_avg momentum_buffer grad_avg" : "square_avg grad_avg")
               : (with_momentum ? "square_avg momentum_buffer" : "square_avg");
  static constexpr const char* scalar_state_names = "step";
  static constexpr int states = 1 + with_momentum + centered;

  template <class real>
  struct StepScalars {
    Regularization<real> regularization;
    real lr;
    real alpha;
    real one_minus_alpha;
    real eps;
    real momentum;
  };

  static FASTOPS_FN StepScalars<double> scalars_for_step(const double* o, ScalarStates, bool) {
    return {.regularization = fastops::regularization(o[0], o[3], o[5], o[6], o[7]),
            .lr = o[0],
            .alpha = o[1],
            .one_minus_alpha = 1.0 - o[1],
            .eps = o[2],
            .momentum = o[4]};
  }

  template <class real, class T>
  static FASTOPS_FN void step(const StepScalars<real>& n, T& p, T g, T (&s)[states]) {
    g = regularized(n.regularization, p, g);
    s[0] = s[0] * T(n.alpha) + T(n.one_minus_alpha) * g * g;
    T second = s[0];
    if constexpr (centered) {
      T& mean = s[states - 1];
      mean = lerp(mean, g, n.one_minus_alpha);
      second = second - mean * mean;
    }
    const T scale = sqrt(second) + T(n.eps);
    T move = g / scale;
    if constexpr (with_momentum) move = s[1] = s[1] * T(n.momentum) + move;
    p = p - T(n.lr) * move;
    p = thresholded(n.regularization, p, scale);
  }
};

// Adagrad (Duchi, Hazan and Singer, 2011).
struct Adagrad {
  static constexpr const char* name = "adagrad";
  static constexpr const char* options =
      "float lr, float lr_decay, float eps, float weight_decay, bool maximize=False, float l1=0.0, "
      "bool proximal=False";
  static constexpr const char* state_names = "sum";
  static constexpr const char* scalar_state_names = "step";
  static constexpr int states = 1;

  template <class real>
  struct StepScalars {
    Regularization<real> regularization;
    real lr;  // decayed
    real eps;
  };

  static FASTOPS_FN StepScalars<double> scalars_for_step(const double* o, ScalarStates state,
                                                         bool) {
    const double lr = o[0] / (1.0 + (state.step() - 1.0) * o[1]);
    return {.regularization = fastops::regularization(lr, o[3], o[4], o[5], o[6]),
            .lr = lr,
            .eps = o[2]};
  }

  template <class real, class T>
  static FASTOPS_FN void step(const StepScalars<real>& n, T& p, T g, T (&s)[states]) {
    g = regularized(n.regularization, p, g);
    s[0] = s[0] + g * g;
    const T scale = sqrt(s[0]) + T(n.eps);
    p = p - T(n.lr) * g / scale;
    p = thresholded(n.regularization, p, scale);
  }
};

// Adadelta (Zeiler, 2012).
struct Adadelta {
  static constexpr const char* name = "adadelta";
  static constexpr const char* options =
      "float lr, float rho, float eps, float weight_decay, bool maximize=False, float l1=0.0, bool "
      "proximal=False";
  static constexpr const char* state_names = "square_avg acc_delta";
  static constexpr const char* scalar_state_names = "step";
  static constexpr int states = 2;

  template <class real>
  struct StepScalars {
    Regularization<real> regularization;
    real lr;
    real rho;
    real one_minus_rho;
    real eps;
  };

  static FASTOPS_FN StepScalars<double> scalars_for_step(const double* o, ScalarStates, bool) {
    return {.regularization = fastops::regularization(o[0], o[3], o[4], o[5], o[6]),
            .lr = o[0],
            .rho = o[1],
            .one_minus_rho = 1.0 - o[1],
            .eps = o[2]};
  }

  template <class real, class T>
  static FASTOPS_FN void step(const StepScalars<real>& n, T& p, T g, T (&s)[states]) {
    g = regularized(n.regularization, p, g);
    s[0] = s[0] * T(n.rho) + T(n.one_minus_rho) * g * g;
    const T root = sqrt(s[0] + T(n.eps)), last = sqrt(s[1] + T(n.eps));
    const T delta = last / root * g;
    s[1] = s[1] * T(n.rho) + T(n.one_minus_rho) * delta * delta;
    p = p - T(n.lr) * delta;
    p = thresholded(n.regularization, p, root / last);
  }
};

// Adamax: Adam with the infinity norm (Kingma and Ba, 2014, section 7.1).
struct Adamax {
  static constexpr const char* name = "adamax";
  static constexpr const char* options =
      "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize=False, "
      "float l1=0.0, bool proximal=False";
  static constexpr const char* state_names = "exp_avg exp_inf";
  static constexpr const char* scalar_state_names = "step";
  static constexpr int states = 2;

  template <class real>
  struct StepScalars {
    Regularization<real> regularization;
    real one_minus_beta1;
    real beta2;
    real step_size;  // lr / (1 - beta1^step)
    real eps;
  };

  static FASTOPS_FN StepScalars<double> scalars_for_step(const double* o, ScalarStates state,
                                                         bool) {
    return {.regularization = fastops::regularization(o[0], o[4], o[5], o[6], o[7]),
            .one_minus_beta1 = 1.0 - o[1],
            .beta2 = o[2],
            .step_size = o[0] / (1.0 - ::pow(o[1], state.step())),
            .eps = o[3]};
  }

  template <class real, class T>
  static FASTOPS_FN void step(const StepScalars<real>& n, T& p, T g, T (&s)[states]) {
    g = regularized(n.regularization, p, g);
    s[0] = lerp(s[0], g, n.one_minus_beta1);
    s[1] = max(s[1] * T(n.beta2), abs(g) + T(n.eps));
    p = p - T(n.step_size) * s[0] / s[1];
    p = thresholded(n.regularization, p, s[1]);
  }
};

// NAdam: Adam with Nesterov's momentum (Dozat, 2016), the weight decay coupled or decoupled.
struct NAdam {
  static constexpr const char* name = "nadam";
  static constexpr const char* options =
      "float lr, float beta1, float beta2, float eps, float weight_decay, float momentum_decay, "
      "bool maximize=False, bool decoupled_weight_decay=False, float l1=0.0, bool proximal=False";
  static constexpr const char* state_names = "exp_avg exp_avg_sq";
  static constexpr const char* scalar_state_names = "step mu_product";
  static constexpr int states = 2;

  template <class real>
  struct StepScalars {
    Regularization<real> regularization;
    real keep;  // decoupled: 1 - lr weight_decay
    real one_minus_beta1;
    real beta2;
    real one_minus_beta2;
    real correction2;  // 1 - beta2^step
    real eps;
    real of_gradient;  // lr (1 - mu) / (1 - the product of all mu so far)
    real of_momentum;  // lr times the next mu / (1 - the product up to it)
  };

  // A momentum that grows towards beta1.
  static FASTOPS_FN double momentum(const double* o, double step) {
    return o[1] * (1.0 - 0.5 * ::pow(0.96, step * o[5]));
  }
  static FASTOPS_FN StepScalars<double> scalars_for_step(const double* o, ScalarStates state,
                                                         bool) {
    const double lr = o[0], weight_decay = o[4], step = state.step();
    const bool decoupled = o[7] != 0;
    const double mu = momentum(o, step), next = momentum(o, step + 1.0);
    state.multiply(1, mu);
    const double product = state[1];
    return {.regularization =
                fastops::regularization(lr, decoupled ? 0.0 : weight_decay, o[6], o[8], o[9]),
            .keep = decoupled ? 1.0 - lr * weight_decay : 1.0,
            .one_minus_beta1 = 1.0 - o[1],
            .beta2 = o[2],
            .one_minus_beta2 = 1.0 - o[2],
            .correction2 = 1.0 - ::pow(o[2], step),
            .eps = o[3],
            .of_gradient = lr * (1.0 - mu) / (1.0 - product),
            .of_momentum = lr * next / (1.0 - product * next)};
  }

  template <class real, class T>
  static FASTOPS_FN void step(const StepScalars<real>& n, T& p, T g, T (&s)[states]) {
    g = regularized(n.regularization, p, g);
    if (n.keep != real(1)) p = p * T(n.keep);
    s[0] = lerp(s[0], g, n.one_minus_beta1);
    s[1] = s[1] * T(n.beta2) + T(n.one_minus_beta2) * g * g;
    const T scale = sqrt(s[1] / T(n.correction2)) + T(n.eps);
    p = p - T(n.of_gradient) * g / scale;
    p = p - T(n.of_momentum) * s[0] / scale;
    p = thresholded(n.regularization, p, scale);
  }
};

// RAdam: Adam whose adaptive step is rectified, and left out while its variance is not known (Liu
// et al., 2019), the weight decay coupled or decoupled.
struct RAdam {
  static constexpr const char* name = "radam";
  static constexpr const char* options =
      "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize=False, "
      "bool decoupled_weight_decay=False, float l1=0.0, bool proximal=False";
  static constexpr const char* state_names = "exp_avg exp_avg_sq";
  static constexpr const char* scalar_state_names = "step";
  static constexpr int states = 2;

  template <class real>
  struct StepScalars {
    Regularization<real> regularization;
    real keep;  // decoupled: 1 - lr weight_decay
    real one_minus_beta1;
    real beta2;
    real one_minus_beta2;
    real step_size;      // lr / (1 - beta1^step)
    real rectification;  // times sqrt(1 - beta2^step), or 0 while the step is not adaptive
    real eps;
  };

  static FASTOPS_FN StepScalars<double> scalars_for_step(const double* o, ScalarStates state,
                                                         bool) {
    const double lr = o[0], beta2 = o[2], weight_decay = o[4], step = state.step();
    const bool decoupled = o[6] != 0;
    const double power = ::pow(beta2, step), correction2 = 1.0 - power;
    // The length of the moving average as a simple one, at most and so far.
    const double longest = 2.0 / (1.0 - beta2) - 1.0;
    const double length = longest - 2.0 * step * power / correction2;
    const double rectification = length > 5.0 ? ::sqrt((length - 4.0) * (length - 2.0) * longest /
                                                       ((longest - 4.0) * (longest - 2.0) * length))
                                              : 0.0;
    return {.regularization =
                fastops::regularization(lr, decoupled ? 0.0 : weight_decay, o[5], o[7], o[8]),
            .keep = decoupled ? 1.0 - lr * weight_decay : 1.0,
            .one_minus_beta1 = 1.0 - o[1],
            .beta2 = beta2,
            .one_minus_beta2 = 1.0 - beta2,
            .step_size = lr / (1.0 - ::pow(o[1], step)),
            .rectification = rectification * ::sqrt(correction2),
            .eps = o[3]};
  }

  template <class real, class T>
  static FASTOPS_FN void step(const StepScalars<real>& n, T& p, T g, T (&s)[states]) {
    g = regularized(n.regularization, p, g);
    if (n.keep != real(1)) p = p * T(n.keep);
    s[0] = lerp(s[0], g, n.one_minus_beta1);
    s[1] = s[1] * T(n.beta2) + T(n.one_minus_beta2) * g * g;
    T scale = T(real(1));
    if (n.rectification != real(0)) scale = (sqrt(s[1]) + T(n.eps)) / T(n.rectification);
    p = p - T(n.step_size) * s[0] / scale;
    p = thresholded(n.regularization, p, scale);
  }
};

// Rprop (Riedmiller and Braun, 1993): a step size of its own for every element, which grows where
// the gradient keeps its sign and shrinks where that changes.
struct Rprop {
  static constexpr const char* name = "rprop";
  static constexpr const char* options =
      "float etaminus, float etaplus, float step_size_min, float step_size_max, bool "
      "maximize=False, float l1=0.0, bool proximal=False";
  static constexpr const char* state_names = "prev step_size";
  static constexpr const char* scalar_state_names = "step";
  static constexpr int states = 2;

  template <class real>
  struct StepScalars {
    Regularization<real> regularization;
    real etaminus, etaplus;
    real smallest, largest;
  };

  static FASTOPS_FN StepScalars<double> scalars_for_step(const double* o, ScalarStates, bool) {
    return {.regularization = fastops::regularization(1.0, 0.0, o[4], o[5], o[6]),
            .etaminus = o[0],
            .etaplus = o[1],
            .smallest = o[2],
            .largest = o[3]};
  }

  template <class real, class T>
  static FASTOPS_FN void step(const StepScalars<real>& n, T& p, T g, T (&s)[states]) {
    g = regularized(n.regularization, p, g);
    const T zero = c<T>(0), one = c<T>(1), agreement = g * s[0];
    const T factor =
        select(agreement > zero, T(n.etaplus), select(agreement < zero, T(n.etaminus), one));
    s[1] = min(max(s[1] * factor, T(n.smallest)), T(n.largest));
    g = select(agreement < zero, zero, g);
    p = p - select(g > zero, s[1], select(g < zero, zero - s[1], zero));
    p = thresholded(n.regularization, p, one / s[1]);
    s[0] = g;
  }
};

// Averaged stochastic gradient descent (Polyak and Juditsky, 1992).
struct ASGD {
  static constexpr const char* name = "asgd";
  static constexpr const char* options =
      "float lr, float lambd, float alpha, float t0, float weight_decay, bool maximize=False, "
      "float l1=0.0, bool proximal=False";
  static constexpr const char* state_names = "ax";
  static constexpr const char* scalar_state_names = "step eta mu";
  static constexpr int states = 1;

  template <class real>
  struct StepScalars {
    Regularization<real> regularization;
    real keep;  // 1 - lambd eta
    real eta;
    real mu;  // of the parameter in the average
  };

  // eta and mu are those that the step before left.
  static FASTOPS_FN StepScalars<double> scalars_for_step(const double* o, ScalarStates state,
                                                         bool) {
    const double lr = o[0], lambd = o[1], step = state.step(), eta = state[1], mu = state[2];
    state.set(1, lr / ::pow(1.0 + lambd * lr * step, o[2]));
    state.set(2, 1.0 / (step - o[3] > 1.0 ? step - o[3] : 1.0));
    return {.regularization = fastops::regularization(eta, o[4], o[5], o[6], o[7]),
            .keep = 1.0 - lambd * eta,
            .eta = eta,
            .mu = mu};
  }

  template <class real, class T>
  static FASTOPS_FN void step(const StepScalars<real>& n, T& p, T g, T (&s)[states]) {
    g = regularized(n.regularization, p, g);
    p = p * T(n.keep);
    p = p - T(n.eta) * g;
    p = thresholded(n.regularization, p);
    s[0] = n.mu != real(1) ? s[0] + (p - s[0]) * T(n.mu) : p;
  }
};

// What a back end's table has for Op::scalars_for_step(); see ScalarsForStep.
template <class Op>
FASTOPS_FN void write_scalars(const double* options, bool first, double* scalar_states,
                              unsigned in_double, double* scalars) {
  const auto made = Op::scalars_for_step(options, {scalar_states, in_double}, first);
  __builtin_memcpy(scalars, &made, sizeof made);
}

using Optimizers = List<Adam<false>, Adam<true>, SGD<false>, SGD<true>, RMSprop<false, false>,
                        RMSprop<true, false>, RMSprop<false, true>, RMSprop<true, true>, Adagrad,
                        Adadelta, Adamax, NAdam, RAdam, Rprop, ASGD>;

}  // namespace fastops
