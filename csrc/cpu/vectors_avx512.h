// AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles in a register. See vectors_generic.h for the interface.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "../arithmetic.h"

namespace fastfs {
namespace {
struct Single {
  static constexpr int kLanes = 16;
  __m512 v;
  FASTFS_HD static Single zero() { return {_mm512_setzero_ps()}; }
  FASTFS_HD static Single splat(double x) { return {_mm512_set1_ps(static_cast<float>(x))}; }
  template <class F>
  FASTFS_HD static Single load(const char* p) {
    if constexpr (std::is_same_v<F, F32>) {
      return {_mm512_loadu_ps(p)};
    } else if constexpr (std::is_same_v<F, F64>) {
      const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(p)), high = _mm512_cvtpd_ps(_mm512_loadu_pd(p + 64));
      return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
    } else {
      const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      if constexpr (std::is_same_v<F, F16>) return {_mm512_cvtph_ps(h)};
      return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
    }
  }
  template <class To>
  FASTFS_HD void store(char* p) const {
    if constexpr (std::is_same_v<To, F64>) {
      _mm512_storeu_pd(p, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
      _mm512_storeu_pd(p + 64, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
    } else if constexpr (std::is_same_v<To, F32>) {
      _mm512_storeu_ps(p, v);
    } else if constexpr (std::is_same_v<To, F16>) {
      const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
    } else {
      const __m512i u = _mm512_castps_si512(v);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
      const __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      const __m512i h = _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(up, 16), _mm512_set1_epi32(0x7fc0));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(h));
    }
  }
  FASTFS_HD void add_to(double* t) const {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    _mm512_storeu_pd(t, _mm512_add_pd(_mm512_loadu_pd(t), low));
    _mm512_storeu_pd(t + 8, _mm512_add_pd(_mm512_loadu_pd(t + 8), high));
  }
};
FASTFS_HD Single add(Single a, Single b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTFS_HD Single sub(Single a, Single b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTFS_HD Single mul(Single a, Single b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTFS_HD Single quotient(Single a, Single b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTFS_HD Single root(Single a) { return {_mm512_sqrt_ps(a.v)}; }
FASTFS_HD Single mul_add(Single a, Single b, Single c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTFS_HD Single absolute(Single a) { return {_mm512_abs_ps(a.v)}; }
FASTFS_HD Single exponent_part(Single a) {
  return {_mm512_and_ps(a.v, _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000)))};
}
FASTFS_HD Single larger(Single a, double bound) {
  return {_mm512_max_ps(a.v, _mm512_set1_ps(static_cast<float>(bound)))};
}
FASTFS_HD Single where_at_least(Single a, double bound, Single value, double otherwise) {
  const __mmask16 m = _mm512_cmp_ps_mask(_mm512_abs_ps(a.v), _mm512_set1_ps(static_cast<float>(bound)), _CMP_NLT_UQ);
  return {_mm512_mask_blend_ps(m, _mm512_set1_ps(static_cast<float>(otherwise)), value.v)};
}

struct Double {
  static constexpr int kLanes = 8;
  __m512d v;
  FASTFS_HD static Double zero() { return {_mm512_setzero_pd()}; }
  FASTFS_HD static Double splat(double x) { return {_mm512_set1_pd(x)}; }
  template <class F>
  FASTFS_HD static Double load(const char* p) {
    if constexpr (std::is_same_v<F, F64>) {
      return {_mm512_loadu_pd(p)};
    } else if constexpr (std::is_same_v<F, F32>) {
      return {_mm512_cvtps_pd(_mm256_loadu_ps(reinterpret_cast<const float*>(p)))};
    } else {
      const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (std::is_same_v<F, F16>) return {_mm512_cvtps_pd(_mm256_cvtph_ps(h))};
      return {_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)))};
    }
  }
  FASTFS_HD void add_to(double* t) const { _mm512_storeu_pd(t, _mm512_add_pd(_mm512_loadu_pd(t), v)); }
};
FASTFS_HD Double add(Double a, Double b) { return {_mm512_add_pd(a.v, b.v)}; }
FASTFS_HD Double sub(Double a, Double b) { return {_mm512_sub_pd(a.v, b.v)}; }
FASTFS_HD Double mul(Double a, Double b) { return {_mm512_mul_pd(a.v, b.v)}; }
FASTFS_HD Double quotient(Double a, Double b) { return {_mm512_div_pd(a.v, b.v)}; }
FASTFS_HD Double root(Double a) { return {_mm512_sqrt_pd(a.v)}; }
FASTFS_HD Double mul_add(Double a, Double b, Double c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
FASTFS_HD Double absolute(Double a) { return {_mm512_abs_pd(a.v)}; }
FASTFS_HD Double scaled(Double a, double s) { return {_mm512_mul_pd(a.v, _mm512_set1_pd(s))}; }
FASTFS_HD Double exponent_part(Double a) {
  return {_mm512_and_pd(a.v, _mm512_castsi512_pd(_mm512_set1_epi64(0x7ff0000000000000)))};
}
FASTFS_HD Double larger(Double a, double bound) { return {_mm512_max_pd(a.v, _mm512_set1_pd(bound))}; }
FASTFS_HD Double where_at_least(Double a, double bound, Double value, double otherwise) {
  const __mmask8 m = _mm512_cmp_pd_mask(_mm512_abs_pd(a.v), _mm512_set1_pd(bound), _CMP_NLT_UQ);
  return {_mm512_mask_blend_pd(m, _mm512_set1_pd(otherwise), value.v)};
}
FASTFS_HD void add_to(Double* t, Single x) {
  t[0] = add(t[0], {_mm512_cvtps_pd(_mm512_castps512_ps256(x.v))});
  t[1] = add(t[1], {_mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))});
}
FASTFS_HD double sum_of_lanes(Double a) {
  const __m256d u = _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  const __m128d w = _mm_add_pd(_mm256_castpd256_pd128(u), _mm256_extractf128_pd(u, 1));
  return _mm_cvtsd_f64(_mm_add_sd(w, _mm_unpackhi_pd(w, w)));
}
}  // namespace

template <>
struct is_single<Single> {
  static constexpr bool value = true;
};

}  // namespace fastfs
