// What all measurements share: how sums are accumulated, repeated in double and merged.
//
// A measurement is a struct of sums (feature_sums.h, parameter_sums.h), listed in measurements.h, with
//   kInputs        tensors per layer; all have the dtype F but the last, which may have another one
//   kSums          sums, in the order of `names` of the class in fastfs/_stats
//   kCounted       inputs whose non-finite entries are counted: the first so many
//   kCoefficients  numbers that a layer brings along for all its elements
//   kOneDtype      whether the last input has to have the dtype F as well
//   kSixteenBit    whether F may be float16 or bfloat16
//   kOfFormat      whether the terms or factors depend on the dtype F
//   is_square(k)   whether sum k is a sum of squares, which float may lose to underflow
//   add_terms<F>   adds the terms of one element of every input to the accumulators
//   factor<F, V>   what the accumulator of sum k is multiplied with at the end of a chunk
//
// Error budget. A float accumulator takes at most kChain elements and is then added to a double. So the error of a sum
// of float terms is less than (2 * kChain) * 2^-24 < 2e-6 of the sum of the absolute terms, however many elements there
// are. A chunk whose squares leave the comfortable range of float, or hold NaN or Inf, is summed again in double: see
// needs_double().
#pragma once

#include "arithmetic.h"

namespace fastfs {

// Elements that a float accumulator takes before it is added to a double one.
constexpr int kChain = 16;

// The coefficients of a layer.
template <class V, int kCount>
struct Coefficients {
  V value[kCount];
};
template <class V>
struct Coefficients<V, 0> {};

template <class V, int kCount>
FASTFS_HD Coefficients<V, kCount> coefficients_at(const double* p) {
  Coefficients<V, kCount> c;
  if constexpr (kCount > 0) {
    for (int i = 0; i < kCount; ++i) c.value[i] = splat<V>(p[i]);
  }
  return c;
}

// A partial result: of a chunk, a group of chunks or a segment.
template <class Sums>
struct Partial {
  double sum[Sums::kSums];
  double nonfinite;  // entries of the counted inputs that are NaN or Inf; a double counts exactly to 2^53
};

template <class Sums>
FASTFS_HD void clear(Partial<Sums>& p) {
  for (int k = 0; k < Sums::kSums; ++k) p.sum[k] = 0.0;
  p.nonfinite = 0.0;
}
template <class Sums>
FASTFS_HD void merge(Partial<Sums>& into, const Partial<Sums>& other) {
  for (int k = 0; k < Sums::kSums; ++k) into.sum[k] += other.sum[k];
  into.nonfinite += other.nonfinite;
}

// Whether a chunk that was summed in float has to be summed again in double, and its non-finite entries counted: a sum
// overflowed or is NaN, or the squares are so small that products of float lose digits to underflow.
template <class Sums>
FASTFS_HD bool needs_double(int k, double sum) {
  return !(sum - sum == 0.0) || (Sums::is_square(k) && sum != 0.0 && sum < 0x1p-100);
}
template <class Sums>
FASTFS_HD bool needs_double(const Partial<Sums>& p) {
  bool again = false;
  for (int k = 0; k < Sums::kSums; ++k) again = again || needs_double<Sums>(k, p.sum[k]);
  return again;
}

}  // namespace fastfs
