// AVX2 with FMA and F16C: 8 floats or 4 doubles in a register. See vectors_generic.h for the interface.
#pragma once

#include <immintrin.h>

#include "../arithmetic.h"

namespace fastfs {
namespace {
struct Single {
  static constexpr int kLanes = 8;
  __m256 v;
  FASTFS_HD static Single zero() { return {_mm256_setzero_ps()}; }
  FASTFS_HD static Single splat(double x) { return {_mm256_set1_ps(static_cast<float>(x))}; }
  template <class F>
  FASTFS_HD static Single load(const char* p) {
    if constexpr (std::is_same_v<F, F32>) {
      return {_mm256_loadu_ps(reinterpret_cast<const float*>(p))};
    } else if constexpr (std::is_same_v<F, F64>) {
      const double* d = reinterpret_cast<const double*>(p);
      return {_mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(d + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(d)))};
    } else {
      const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (std::is_same_v<F, F16>) return {_mm256_cvtph_ps(h)};
      return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
    }
  }
  template <class To>
  FASTFS_HD void store(char* p) const {
    if constexpr (std::is_same_v<To, F64>) {
      double* d = reinterpret_cast<double*>(p);
      _mm256_storeu_pd(d, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
      _mm256_storeu_pd(d + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    } else if constexpr (std::is_same_v<To, F32>) {
      _mm256_storeu_ps(reinterpret_cast<float*>(p), v);
    } else if constexpr (std::is_same_v<To, F16>) {
      const __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
    } else {
      const __m256i u = _mm256_castps_si256(v);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
      const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
      const __m256i h = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
      const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
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
FASTFS_HD Single larger(Single a, double bound) {
  return {_mm256_max_ps(a.v, _mm256_set1_ps(static_cast<float>(bound)))};
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
    if constexpr (std::is_same_v<F, F64>) {
      return {_mm256_loadu_pd(reinterpret_cast<const double*>(p))};
    } else if constexpr (std::is_same_v<F, F32>) {
      return {_mm256_cvtps_pd(_mm_loadu_ps(reinterpret_cast<const float*>(p)))};
    } else {
      const __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      if constexpr (std::is_same_v<F, F16>) return {_mm256_cvtps_pd(_mm_cvtph_ps(h))};
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
FASTFS_HD Double larger(Double a, double bound) { return {_mm256_max_pd(a.v, _mm256_set1_pd(bound))}; }
FASTFS_HD Double where_at_least(Double a, double bound, Double value, double otherwise) {
  const __m256d m = _mm256_cmp_pd(absolute(a).v, _mm256_set1_pd(bound), _CMP_NLT_UQ);
  return {_mm256_blendv_pd(_mm256_set1_pd(otherwise), value.v, m)};
}
FASTFS_HD void add_to(Double* t, Single x) {
  t[0] = add(t[0], {_mm256_cvtps_pd(_mm256_castps256_ps128(x.v))});
  t[1] = add(t[1], {_mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1))});
}
FASTFS_HD double sum_of_lanes(Double a) {
  const __m128d w = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(w, _mm_unpackhi_pd(w, w)));
}
}  // namespace

template <>
struct is_single<Single> {
  static constexpr bool value = true;
};

}  // namespace fastfs
