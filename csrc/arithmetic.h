// Storage dtypes as tags, and the scalar arithmetic of the measurements: one definition for every CPU instruction set
// and for CUDA.
//
// V is the type that a caller computes with: float or double (a CUDA thread), or a vector of them (the CPU loops,
// cpu/vectors_*.h). A vector type brings its own overloads of the functions below, found by argument-dependent lookup.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__) || defined(FASTFS_CUDA_ON_CPU)
#define FASTFS_HD __host__ __device__ __forceinline__
#else
#define FASTFS_HD inline __attribute__((always_inline))
#endif

namespace fastfs {

// The storage dtypes as types.
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

// Bytes of an element.
template <class F>
constexpr int kItemSize = std::is_same_v<F, F64>   ? 8
                          : std::is_same_v<F, F32> ? 4
                                                   : 2;

FASTFS_HD float add(float a, float b) { return a + b; }
FASTFS_HD float sub(float a, float b) { return a - b; }
#if defined(__CUDA_ARCH__)
// The intrinsics keep nvcc from fusing a product with the addition that takes it in some kernels only.
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

// 2^floor(log2|a|): a with its exponent bits only. 0 for zero and subnormals of V, inf for NaN and Inf.
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
// `value` where |a| >= bound or a is NaN, else `otherwise`.
FASTFS_HD float where_at_least(float a, double bound, float value, double otherwise) {
  return __builtin_fabsf(a) < static_cast<float>(bound) ? static_cast<float>(otherwise) : value;
}
FASTFS_HD double where_at_least(double a, double bound, double value, double otherwise) {
  return __builtin_fabs(a) < bound ? otherwise : value;
}
// The larger of a, which is not NaN, and a bound.
FASTFS_HD float larger(float a, double bound) {
#if defined(__CUDA_ARCH__)
  return ::fmaxf(a, static_cast<float>(bound));
#else
  return a > static_cast<float>(bound) ? a : static_cast<float>(bound);
#endif
}
FASTFS_HD double larger(double a, double bound) { return a > bound ? a : bound; }
FASTFS_HD float scaled(float a, double s) { return a * static_cast<float>(s); }
FASTFS_HD double scaled(double a, double s) { return a * s; }

// Whether V is float or a vector of floats. Specialised beside each vector type.
template <class V>
struct is_single {
  static constexpr bool value = false;
};
template <>
struct is_single<float> {
  static constexpr bool value = true;
};

// x in every lane of V.
template <class V>
FASTFS_HD V splat(double x) {
  if constexpr (std::is_same_v<V, float> || std::is_same_v<V, double>) {
    return static_cast<V>(x);
  } else {
    return V::splat(x);
  }
}

}  // namespace fastfs
