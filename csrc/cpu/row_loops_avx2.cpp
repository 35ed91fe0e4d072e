// AVX2 with FMA and F16C: 16 floats are two registers, 16 doubles are four.
#include <immintrin.h>

#include "../rows.h"
#include "row_loops.h"

namespace fastfs::cpu {
namespace {

struct Floats {
  __m256 v[2];
  FASTFS_HD static Floats zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  template <class F>
  FASTFS_HD static Floats load(const char* p) {
    if constexpr (same_dtype<F, F64>::value) {
      return {{eight_doubles(p), eight_doubles(p + 64)}};
    } else if constexpr (same_dtype<F, F32>::value) {
      const float* f = reinterpret_cast<const float*>(p);
      return {{_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8)}};
    } else {
      return {{eight_halves<F>(p), eight_halves<F>(p + 16)}};
    }
  }
  template <class To>
  FASTFS_HD void store(char* p) const {
    if constexpr (same_dtype<To, F64>::value) {
      double* d = reinterpret_cast<double*>(p);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        _mm256_storeu_pd(d + 8 * i, _mm256_cvtps_pd(_mm256_castps256_ps128(v[i])));
        _mm256_storeu_pd(d + 8 * i + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(v[i], 1)));
      }
    } else if constexpr (same_dtype<To, F32>::value) {
      float* f = reinterpret_cast<float*>(p);
      _mm256_storeu_ps(f, v[0]);
      _mm256_storeu_ps(f + 8, v[1]);
    } else if constexpr (same_dtype<To, F16>::value) {
      __m128i* h = reinterpret_cast<__m128i*>(p);
      _mm_storeu_si128(h, _mm256_cvtps_ph(v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      _mm_storeu_si128(h + 1, _mm256_cvtps_ph(v[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      // Packs within halves of the registers: 0-3 of both, then 4-7 of both.
      const __m256i mixed = _mm256_packus_epi32(rounded(v[0]), rounded(v[1]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
    }
  }
  FASTFS_HD void add_square(Floats x) {
    v[0] = _mm256_add_ps(v[0], _mm256_mul_ps(x.v[0], x.v[0]));
    v[1] = _mm256_add_ps(v[1], _mm256_mul_ps(x.v[1], x.v[1]));
  }

 private:
  FASTFS_HD static __m256 eight_doubles(const char* p) {
    const double* d = reinterpret_cast<const double*>(p);
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(d + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(d)));
  }
  template <class F>
  FASTFS_HD static __m256 eight_halves(const char* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (same_dtype<F, F16>::value) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  // To bfloat16, in the lower half of each 32 bits.
  FASTFS_HD static __m256i rounded(__m256 x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
  }
};

struct Doubles {
  __m256d v[4];
  FASTFS_HD static Doubles zero() {
    const __m256d z = _mm256_setzero_pd();
    return {{z, z, z, z}};
  }
  template <class F>
  FASTFS_HD static Doubles load(const char* p) {
    if constexpr (same_dtype<F, F64>::value) {
      const double* d = reinterpret_cast<const double*>(p);
      return {{_mm256_loadu_pd(d), _mm256_loadu_pd(d + 4), _mm256_loadu_pd(d + 8), _mm256_loadu_pd(d + 12)}};
    } else {
      return of(Floats::load<F>(p));
    }
  }
  FASTFS_HD static Doubles of(Floats x) {
    return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.v[0])), _mm256_cvtps_pd(_mm256_extractf128_ps(x.v[0], 1)),
             _mm256_cvtps_pd(_mm256_castps256_ps128(x.v[1])), _mm256_cvtps_pd(_mm256_extractf128_ps(x.v[1], 1))}};
  }
  FASTFS_HD void add_square(Doubles x) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = _mm256_add_pd(v[i], _mm256_mul_pd(x.v[i], x.v[i]));
  }
  FASTFS_HD void add(Doubles x) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = _mm256_add_pd(v[i], x.v[i]);
  }
  FASTFS_HD void add(Floats x) { add(of(x)); }
  FASTFS_HD double sum() const {
    const __m256d u = _mm256_add_pd(_mm256_add_pd(v[0], v[2]), _mm256_add_pd(v[1], v[3]));
    const __m128d w = _mm_add_pd(_mm256_castpd256_pd128(u), _mm256_extractf128_pd(u, 1));
    return _mm_cvtsd_f64(_mm_add_sd(w, _mm_unpackhi_pd(w, w)));
  }
};

constexpr int kRowUnroll = 4;
#include "row_loops_impl.h"
}  // namespace

const RowLoops kRowsAvx2 = kRowTable;

}  // namespace fastfs::cpu
