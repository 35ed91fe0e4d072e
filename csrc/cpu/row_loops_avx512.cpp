// AVX-512 (F, BW, DQ, VL): 16 floats are one register, 16 doubles are two.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "../rows.h"
#include "row_loops.h"

namespace fastfs::cpu {
namespace {

struct Floats {
  __m512 v;
  FASTFS_HD static Floats zero() { return {_mm512_setzero_ps()}; }
  template <class F>
  FASTFS_HD static Floats load(const char* p) {
    if constexpr (same_dtype<F, F64>::value) {
      const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(p)), high = _mm512_cvtpd_ps(_mm512_loadu_pd(p + 64));
      return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
    } else if constexpr (same_dtype<F, F32>::value) {
      return {_mm512_loadu_ps(p)};
    } else {
      const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      if constexpr (same_dtype<F, F16>::value) return {_mm512_cvtph_ps(h)};
      return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
    }
  }
  template <class To>
  FASTFS_HD void store(char* p) const {
    if constexpr (same_dtype<To, F64>::value) {
      _mm512_storeu_pd(p, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
      _mm512_storeu_pd(p + 64, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
    } else if constexpr (same_dtype<To, F32>::value) {
      _mm512_storeu_ps(p, v);
    } else if constexpr (same_dtype<To, F16>::value) {
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
  FASTFS_HD void add_square(Floats x) { v = _mm512_add_ps(v, _mm512_mul_ps(x.v, x.v)); }
};

struct Doubles {
  __m512d a, b;
  FASTFS_HD static Doubles zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  template <class F>
  FASTFS_HD static Doubles load(const char* p) {
    if constexpr (same_dtype<F, F64>::value) {
      return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 64)};
    } else {
      return of(Floats::load<F>(p));
    }
  }
  FASTFS_HD static Doubles of(Floats x) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))};
  }
  FASTFS_HD void add_square(Doubles x) {
    a = _mm512_add_pd(a, _mm512_mul_pd(x.a, x.a));
    b = _mm512_add_pd(b, _mm512_mul_pd(x.b, x.b));
  }
  FASTFS_HD void add(Doubles x) {
    a = _mm512_add_pd(a, x.a);
    b = _mm512_add_pd(b, x.b);
  }
  FASTFS_HD void add(Floats x) { add(of(x)); }
  FASTFS_HD double sum() const {
    const __m512d t = _mm512_add_pd(a, b);
    const __m256d u = _mm256_add_pd(_mm512_castpd512_pd256(t), _mm512_extractf64x4_pd(t, 1));
    const __m128d w = _mm_add_pd(_mm256_castpd256_pd128(u), _mm256_extractf128_pd(u, 1));
    return _mm_cvtsd_f64(_mm_add_sd(w, _mm_unpackhi_pd(w, w)));
  }
};

constexpr int kRowUnroll = 16;
#include "row_loops_impl.h"
}  // namespace

const RowLoops kRowsAvx512 = kRowTable;

}  // namespace fastfs::cpu
