// The sums over the features of a layer: how they moved in a step, and how the move is aligned with the backward pass.
#pragma once

#include "sums.h"

namespace fastfs {

// Spacing of the format F at a stored value x, in units of spacing_unit<F, V>(). Zero counts as exact (ReLU, masks,
// padding). So do values below the smallest normal number, except in float16, whose subnormal numbers features do
// reach; these are kMinNormal * kEpsilon apart.
template <class F, class V>
FASTFS_HD V spacing(V x) {
  V e = exponent_part(x);
  if constexpr (std::is_same_v<F, F16>) {
    e = larger(e, F16::kMinNormal);
    e = where_at_least(x, 0x1p-24, e, 0.0);
  } else if constexpr (!is_single<V>::value && !std::is_same_v<F, F64>) {
    e = where_at_least(x, F::kMinNormal, e, 0.0);
  }
  // In double the spacing itself is squared, so that it overflows no earlier than in the reference, and it is NaN where
  // x is not finite. In float no factor is needed: a chunk with such a value is summed again in double.
  if constexpr (is_single<V>::value) {
    return e;
  } else {
    return add(scaled(e, F::kEpsilon), sub(x, x));
  }
}
template <class F, class V>
FASTFS_HD constexpr double spacing_unit() {
  return is_single<V>::value ? F::kEpsilon : 1.0;
}

// The sums of fastfs.feature_stats. Inputs: before and after (dtype F), backward.
struct FeatureSums {
  static constexpr int kInputs = 3;
  static constexpr int kSums = 7;  // in the order of FeatureStats.names
  static constexpr int kCounted = 3, kCoefficients = 0;
  static constexpr bool kOneDtype = false, kSixteenBit = true, kOfFormat = true;
  FASTFS_HD static constexpr bool is_square(int k) { return k >= 1 && k <= 3; }

  template <class F, class V>
  FASTFS_HD static void add_terms(V (&acc)[kSums], const V (&x)[kInputs], const Coefficients<V, 0>&) {
    const V before = x[0], after = x[1], backward = x[2];
    const V update = sub(after, before);
    const V product = mul(update, backward);
    acc[0] = add(acc[0], product);
    acc[1] = mul_add(update, update, acc[1]);
    acc[2] = mul_add(backward, backward, acc[2]);
    acc[3] = mul_add(before, before, acc[3]);
    acc[4] = mul_add(before, update, acc[4]);
    acc[5] = add(acc[5], absolute(product));
    const V p = spacing<F>(before), q = spacing<F>(after);
    acc[6] = mul_add(p, p, acc[6]);
    acc[6] = mul_add(q, q, acc[6]);
  }

  // Only the rounding variance has a factor: spacing^2 / 12 per rounding.
  template <class F, class V>
  FASTFS_HD static double factor(int k) {
    return k == 6 ? spacing_unit<F, V>() * spacing_unit<F, V>() / 12.0 : 1.0;
  }
};

}  // namespace fastfs
