// The sums of each measurement and how partial results merge: one definition for every CPU
// instruction set and for CUDA.
//
// A measurement is a struct (FeatureSums, UpdateSums, those of updates.h) whose `add_terms` takes one element of each
// input and adds its terms to the accumulators. V is what the caller computes with: float or double (a CUDA
// thread, the generic CPU loop) or a vector of them (AVX2, AVX-512); V needs the free functions
// below. F is the storage dtype of the first inputs, which the rounding noise depends on.
//
// Error budget. Accumulators in float take at most kChain elements and are then added to double
// ones, so a sum of float terms is off by at most (2 * kChain) * 2^-24 < 2e-6 of the sum of the
// absolute terms, whatever the number of elements. A chunk whose squares leave the comfortable range
// of float (or hold NaN or Inf) is done again with V of double: see needs_double().
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(FASTFS_CUDA_ON_CPU)
#define FASTFS_HD __host__ __device__ __forceinline__
#else
#define FASTFS_HD inline __attribute__((always_inline))
#endif

namespace fastfs {

// Elements that a float accumulator takes before it is added to a double one.
constexpr int kChain = 16;

// Storage dtypes, as tags: what the rounding of a stored value depends on.
//   kEpsilon    spacing of the format at 1
//   kMinNormal  smallest normal number
struct F16 {
  static constexpr double kEpsilon = 0x1p-10, kMinNormal = 0x1p-14;
};
struct BF16 {
  static constexpr double kEpsilon = 0x1p-7, kMinNormal = 0x1p-126;
};
struct F32 {
  static constexpr double kEpsilon = 0x1p-23, kMinNormal = 0x1p-126;
};
struct F64 {
  static constexpr double kEpsilon = 0x1p-52, kMinNormal = 0x1p-1022;
};

template <class A, class B>
struct same_dtype {
  static constexpr bool value = false;
};
template <class A>
struct same_dtype<A, A> {
  static constexpr bool value = true;
};

// Scalar arithmetic. A vector type brings its own overloads of these, found by argument-dependent lookup.
FASTFS_HD float add(float a, float b) { return a + b; }
FASTFS_HD float sub(float a, float b) { return a - b; }
#if defined(__CUDA_ARCH__)
// The rounded product: nvcc would fuse a plain one with the addition that takes it, in one kernel and not in another.
FASTFS_HD float mul(float a, float b) { return __fmul_rn(a, b); }
FASTFS_HD double mul(double a, double b) { return __dmul_rn(a, b); }
FASTFS_HD float quotient(float a, float b) { return __fdiv_rn(a, b); }
FASTFS_HD double quotient(double a, double b) { return __ddiv_rn(a, b); }
FASTFS_HD float root(float a) { return __fsqrt_rn(a); }
FASTFS_HD double root(double a) { return __dsqrt_rn(a); }
#else
FASTFS_HD float mul(float a, float b) { return a * b; }
FASTFS_HD double mul(double a, double b) { return a * b; }
FASTFS_HD float quotient(float a, float b) { return a / b; }
FASTFS_HD double quotient(double a, double b) { return a / b; }
FASTFS_HD float root(float a) { return __builtin_sqrtf(a); }
FASTFS_HD double root(double a) { return __builtin_sqrt(a); }
#endif
FASTFS_HD float mul_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTFS_HD float absolute(float a) { return __builtin_fabsf(a); }
FASTFS_HD double add(double a, double b) { return a + b; }
FASTFS_HD double sub(double a, double b) { return a - b; }
FASTFS_HD double mul_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
FASTFS_HD double absolute(double a) { return __builtin_fabs(a); }

// 2^floor(log2|a|): the number with the exponent bits alone. 0 for zero and subnormals of V, inf for NaN and Inf.
FASTFS_HD float exponent_part(float a) {
  uint32_t u;
  __builtin_memcpy(&u, &a, sizeof u);
  u &= 0x7f800000u;
  __builtin_memcpy(&a, &u, sizeof u);
  return a;
}
FASTFS_HD double exponent_part(double a) {
  uint64_t u;
  __builtin_memcpy(&u, &a, sizeof u);
  u &= 0x7ff0000000000000u;
  __builtin_memcpy(&a, &u, sizeof u);
  return a;
}
// `otherwise` where |a| is below `bound`, else `value`: also where a is NaN.
FASTFS_HD float where_at_least(float a, double bound, float value, double otherwise) {
  return __builtin_fabsf(a) < static_cast<float>(bound) ? static_cast<float>(otherwise) : value;
}
FASTFS_HD double where_at_least(double a, double bound, double value, double otherwise) {
  return __builtin_fabs(a) < bound ? otherwise : value;
}
FASTFS_HD float scaled(float a, double s) { return a * static_cast<float>(s); }
FASTFS_HD double scaled(double a, double s) { return a * s; }

// Is V a float (or a vector of floats)? Specialised beside each vector type.
template <class V>
struct is_single {
  static constexpr bool value = false;
};
template <>
struct is_single<float> {
  static constexpr bool value = true;
};

// One number in every lane of V.
template <class V>
FASTFS_HD V splat(double x) {
  if constexpr (same_dtype<V, float>::value || same_dtype<V, double>::value) {
    return static_cast<V>(x);
  } else {
    return V::splat(x);
  }
}

// What a layer brings along for all its elements.
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

// Spacing of the format F at a stored value x, in units of spacing_unit<F, V>(). Zero is exact (ReLU, masks, padding),
// and so is, for the formats with the range of float or more, everything below the smallest normal number; float16 has
// subnormals that features do reach, and they are all kMinNormal * kEpsilon apart.
template <class F, class V>
FASTFS_HD V spacing(V x) {
  V e = exponent_part(x);
  if constexpr (same_dtype<F, F16>::value) {
    e = where_at_least(x, F16::kMinNormal, e, F16::kMinNormal);
    e = where_at_least(x, 0x1p-24, e, 0.0);
  } else if constexpr (!is_single<V>::value && !same_dtype<F, F64>::value) {
    e = where_at_least(x, F::kMinNormal, e, 0.0);
  }
  // In double the spacing itself is squared, so that it overflows no earlier than the reference; it is NaN for what is
  // not finite. A chunk of float that holds such a value is done again in double.
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

// fastfs.feature_stats: inputs before, after (dtype F) and backward.
struct FeatureSums {
  static constexpr int kInputs = 3;
  static constexpr int kSums = 7;          // in the order of stats.FeatureStats
  static constexpr int kCounted = 3;       // the first inputs: those whose non-finite entries are counted
  static constexpr int kCoefficients = 0;  // of a layer
  static constexpr bool kOneDtype = false, kSixteenBit = true;  // may dtypes differ, may they have 16 bits
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

  // What a chunk's accumulator has to be multiplied with. Only the rounding variance has a factor: spacing^2 / 12 per
  // rounding.
  template <class F, class V>
  FASTFS_HD static double factor(int k) {
    return k == 6 ? spacing_unit<F, V>() * spacing_unit<F, V>() / 12.0 : 1.0;
  }
};

// fastfs.update_stats: inputs gradient (dtype F) and update.
struct UpdateSums {
  static constexpr int kInputs = 2;
  static constexpr int kSums = 3;  // in the order of stats.UpdateStats
  static constexpr int kCounted = 2, kCoefficients = 0;
  static constexpr bool kOneDtype = false, kSixteenBit = true;
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

// One partial result: of a chunk, a group of chunks or a whole segment.
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

// Must a chunk that was summed in float be done again in double (and its non-finite entries counted)? So if a
// square overflowed or is NaN, or if the squares are so small that products of float lose digits to underflow.
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
