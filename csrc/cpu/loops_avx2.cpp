// AVX2 with FMA and F16C: 8 floats or 4 doubles a register.
#include <immintrin.h>

#include "loops.h"

namespace fastfs {
namespace {
struct Single {
  static constexpr int kLanes = 8;
  __m256 v;
  FASTFS_HD static Single zero() { return {_mm256_setzero_ps()}; }
  FASTFS_HD static Single splat(double x) { return {_mm256_set1_ps(static_cast<float>(x))}; }
  template <class F>
  FASTFS_HD static Single load(const char* p) {
    if constexpr (same_dtype<F, F32>::value) {
      return {_mm256_loadu_ps(reinterpret_cast<const float*>(p))};
    } else {
      const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (same_dtype<F, F16>::value) return {_mm256_cvtph_ps(h)};
      return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
    }
  }
  FASTFS_HD void add_to(double* t) const {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    _mm256_storeu_pd(t, _mm256_add_pd(_mm256_loadu_pd(t), low));
    _mm256_storeu_pd(t + 4, _mm256_add_pd(_mm256_loadu_pd(t + 4), high));
  }
};
FASTFS_HD Single add(Single a, Single b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTFS_HD Single sub(Single a, Single b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTFS_HD Single mul(Single a, Single b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTFS_HD Single quotient(Single a, Single b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTFS_HD Single root(Single a) { return {_mm256_sqrt_ps(a.v)}; }
FASTFS_HD Single mul_add(Single a, Single b, Single c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTFS_HD Single absolute(Single a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FASTFS_HD Single exponent_part(Single a) {
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)))};
}
FASTFS_HD Single where_at_least(Single a, double bound, Single value, double otherwise) {
  const __m256 m = _mm256_cmp_ps(absolute(a).v, _mm256_set1_ps(static_cast<float>(bound)), _CMP_NLT_UQ);
  return {_mm256_blendv_ps(_mm256_set1_ps(static_cast<float>(otherwise)), value.v, m)};
}

struct Double {
  static constexpr int kLanes = 4;
  __m256d v;
  FASTFS_HD static Double zero() { return {_mm256_setzero_pd()}; }
  FASTFS_HD static Double splat(double x) { return {_mm256_set1_pd(x)}; }
  template <class F>
  FASTFS_HD static Double load(const char* p) {
    if constexpr (same_dtype<F, F64>::value) {
      return {_mm256_loadu_pd(reinterpret_cast<const double*>(p))};
    } else if constexpr (same_dtype<F, F32>::value) {
      return {_mm256_cvtps_pd(_mm_loadu_ps(reinterpret_cast<const float*>(p)))};
    } else {
      const __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      if constexpr (same_dtype<F, F16>::value) return {_mm256_cvtps_pd(_mm_cvtph_ps(h))};
      return {_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(h), 16)))};
    }
  }
  FASTFS_HD void add_to(double* t) const { _mm256_storeu_pd(t, _mm256_add_pd(_mm256_loadu_pd(t), v)); }
};
FASTFS_HD Double add(Double a, Double b) { return {_mm256_add_pd(a.v, b.v)}; }
FASTFS_HD Double sub(Double a, Double b) { return {_mm256_sub_pd(a.v, b.v)}; }
FASTFS_HD Double mul(Double a, Double b) { return {_mm256_mul_pd(a.v, b.v)}; }
FASTFS_HD Double quotient(Double a, Double b) { return {_mm256_div_pd(a.v, b.v)}; }
FASTFS_HD Double root(Double a) { return {_mm256_sqrt_pd(a.v)}; }
FASTFS_HD Double mul_add(Double a, Double b, Double c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
FASTFS_HD Double absolute(Double a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
FASTFS_HD Double scaled(Double a, double s) { return {_mm256_mul_pd(a.v, _mm256_set1_pd(s))}; }
FASTFS_HD Double exponent_part(Double a) {
  return {_mm256_and_pd(a.v, _mm256_castsi256_pd(_mm256_set1_epi64x(0x7ff0000000000000)))};
}
FASTFS_HD Double where_at_least(Double a, double bound, Double value, double otherwise) {
  const __m256d m = _mm256_cmp_pd(absolute(a).v, _mm256_set1_pd(bound), _CMP_NLT_UQ);
  return {_mm256_blendv_pd(_mm256_set1_pd(otherwise), value.v, m)};
}
}  // namespace

template <>
struct is_single<Single> {
  static constexpr bool value = true;
};

namespace cpu {
namespace {
constexpr int kUnroll = 4;
#include "loops_impl.h"
}  // namespace

const Loops& loops_avx2() {
  static constexpr Loops loops{"avx2", kTables, &read};
  return loops;
}
}  // namespace cpu
}  // namespace fastfs
