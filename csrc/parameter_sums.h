// The sums over a parameter: how an update is aligned with the gradient, and what one step of an optimizer did,
// computed from the tensors that the step leaves behind.
//
// With w' and w the parameter before and after the step, dw = w - w', g its gradient and s = 1, or -1 to maximise; lr,
// wd (weight decay), mu (momentum), eps and the betas as torch.optim names them, t the number of steps. Every optimizer
// here computes w = w' - lr (direction). Either the direction is in the state, or the equation is linear in w' and can
// be solved for it:
//
//   SGD       buf = mu buf + (1 - dampening)(s g + wd w'), w = w' - lr buf          dw = -lr buf, any dampening
//             without momentum: w = w' - lr (s g + wd w')
//               <=> (1 - lr wd) w' = w + lr s g                          dw = -lr (s g + wd w) / (1 - lr wd)
//             Nesterov: w = w' - lr (s g + wd w' + mu buf)               dw = -lr (s g + mu buf + wd w) / (1 - lr wd)
//             torch's foreach implementation of Nesterov, without decay and s = 1, overwrites g with g + mu buf.
//   RMSprop   with momentum: w = w' - lr buf                             dw = -lr buf
//             without: h = sqrt(square_avg - [centered] grad_avg^2) + eps, w = w' - lr (s g + wd w') / h
//               <=> (h - lr wd) w' = h w + lr s g                        dw = -lr (s g + wd w) / (h - lr wd)
//   Adagrad   h = sqrt(sum) + eps, lr' = lr / (1 + (t - 1) lr_decay): as RMSprop without momentum
//   Adam      u = -lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps), v the maximum with amsgrad
//             w = w' + u; decay is in m                                  dw = u
//   AdamW     w = (1 - lr wd) w' + u                                     dw = (u - lr wd w) / (1 - lr wd)
//   Adamax    w = w' - lr / (1 - beta1^t) m / u_inf                      dw = -lr / (1 - beta1^t) m / u_inf
//   any       with a copy of w'                                          dw = w - w'
//
// These are four rules. In Python, fastfs/_core/optimizer_rules.py declares them, and the table in
// fastfs/_monitor/measure/closed_forms.py says which optimizer of torch follows which of them, with which coefficients.
// All that depends on hyper-parameters and t only goes into coefficients per parameter, in double, so that one launch
// takes parameters of several groups.
#pragma once

#include "sums.h"

namespace fastfs {

// The sums of fastfs.update_stats. Inputs: gradient (dtype F), update.
struct UpdateSums {
  static constexpr int kInputs = 2;
  static constexpr int kSums = 3;  // in the order of UpdateStats.names
  static constexpr int kCounted = 2, kCoefficients = 0;
  static constexpr bool kOneDtype = false, kSixteenBit = true, kOfFormat = false;
  FASTFS_HD static constexpr bool is_square(int k) { return k >= 1; }

  template <class F, class V>
  FASTFS_HD static void add_terms(V (&acc)[kSums], const V (&x)[kInputs], const Coefficients<V, 0>&) {
    const V gradient = x[0], update = x[1];
    acc[0] = mul_add(gradient, update, acc[0]);
    acc[1] = mul_add(update, update, acc[1]);
    acc[2] = mul_add(gradient, gradient, acc[2]);
  }
  template <class F, class V>
  FASTFS_HD static double factor(int) {
    return 1.0;
  }
};

// The sums of fastfs.functional.optimizer_stats, for a rule that computes dw and g.
//
// Inputs: gradient, parameter after the step, and one or two tensors of optimizer state. All have one dtype. Elements
// read beyond the end are zeros, and a rule must map zeros to dw = 0 and g = 0.
template <class Rule>
struct OptimizerSums {
  static constexpr int kInputs = Rule::kInputs;
  static constexpr int kSums = 5;  // in the order of ParameterStats.names
  static constexpr int kCounted = 2, kCoefficients = Rule::kCoefficients;
  static constexpr bool kOneDtype = true, kSixteenBit = Rule::kSixteenBit, kOfFormat = false;
  FASTFS_HD static constexpr bool is_square(int k) { return k >= 2; }

  template <class F, class V>
  FASTFS_HD static void add_terms(V (&acc)[kSums], const V (&x)[kInputs], const Coefficients<V, kCoefficients>& c) {
    const V parameter = x[1], gradient = Rule::gradient(x, c.value), update = Rule::update(x, c.value);
    acc[0] = mul_add(gradient, update, acc[0]);
    acc[1] = mul_add(parameter, update, acc[1]);
    acc[2] = mul_add(update, update, acc[2]);
    acc[3] = mul_add(gradient, gradient, acc[3]);
    acc[4] = mul_add(parameter, parameter, acc[4]);
  }
  template <class F, class V>
  FASTFS_HD static double factor(int) {
    return 1.0;
  }
};

// Replaces a denominator of 0 by 1, so that 0 / 0 counts as no update. (In training 0 / 0 makes the parameter NaN,
// which the sum of w^2 shows.)
template <class V>
FASTFS_HD V denominator(V a) {
  return where_at_least(a, is_single<V>::value ? 0x1p-149 : 0x1p-1074, a, 1.0);
}

// Inputs g, w, s. Coefficients cw, cg, cs, e:   dw = cw w + cg g + cs s,   gradient = g + e s.
// An optimizer without state passes g as s. With cw = 1, cg = 0, cs = -1 and s = w' the only rounding is that of w -
// w'.
struct Linear {
  static constexpr int kInputs = 3, kCoefficients = 4;
  static constexpr bool kSixteenBit = true;
  template <class V>
  FASTFS_HD static V update(const V (&x)[kInputs], const V (&c)[kCoefficients]) {
    return mul_add(c[2], x[2], mul_add(c[1], x[0], mul(c[0], x[1])));
  }
  template <class V>
  FASTFS_HD static V gradient(const V (&x)[kInputs], const V (&c)[kCoefficients]) {
    return mul_add(c[3], x[2], x[0]);
  }
};

// Inputs g, w, m, v. Coefficients cw, cm, r, eps:   dw = cw w + cm m / (r sqrt(v) + eps).
struct Adam {
  static constexpr int kInputs = 4, kCoefficients = 4;
  static constexpr bool kSixteenBit = false;
  template <class V>
  FASTFS_HD static V update(const V (&x)[kInputs], const V (&c)[kCoefficients]) {
    return mul_add(c[0], x[1], quotient(mul(c[1], x[2]), denominator(mul_add(c[2], root(x[3]), c[3]))));
  }
  template <class V>
  FASTFS_HD static V gradient(const V (&x)[kInputs], const V (&)[kCoefficients]) {
    return x[0];
  }
};

// Inputs g, w, m, u. Coefficient cm:   dw = cm m / u.
struct Adamax {
  static constexpr int kInputs = 4, kCoefficients = 1;
  static constexpr bool kSixteenBit = false;
  template <class V>
  FASTFS_HD static V update(const V (&x)[kInputs], const V (&c)[kCoefficients]) {
    return quotient(mul(c[0], x[2]), denominator(x[3]));
  }
  template <class V>
  FASTFS_HD static V gradient(const V (&x)[kInputs], const V (&)[kCoefficients]) {
    return x[0];
  }
};

// Inputs g, w, q, a. Coefficients cw, cg, k, e:   dw = (cw w + cg g) / (sqrt(q - k a^2) + e).
// Without centering k = 0, and w is passed as a. The difference is rounded as torch rounds it: where it nearly cancels,
// its rounding errors are part of the update.
struct Rmsprop {
  static constexpr int kInputs = 4, kCoefficients = 4;
  static constexpr bool kSixteenBit = false;
  template <class V>
  FASTFS_HD static V update(const V (&x)[kInputs], const V (&c)[kCoefficients]) {
    const V variance = sub(x[2], mul(c[2], mul(x[3], x[3])));
    return quotient(mul_add(c[1], x[0], mul(c[0], x[1])), denominator(add(root(variance), c[3])));
  }
  template <class V>
  FASTFS_HD static V gradient(const V (&x)[kInputs], const V (&)[kCoefficients]) {
    return x[0];
  }
};

using LinearSums = OptimizerSums<Linear>;
using AdamSums = OptimizerSums<Adam>;
using AdamaxSums = OptimizerSums<Adamax>;
using RmspropSums = OptimizerSums<Rmsprop>;

}  // namespace fastfs
