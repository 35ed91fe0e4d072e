// Any processor: plain loops over 16 lanes, which the compiler vectorises as far as its baseline allows. Without
// fused multiply-add in the baseline (x86-64) fmaf is a call: right and slow, for machines older than AVX2.
#include "loops.h"

namespace fastfs {
namespace {
FASTFS_HD float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  float f;
  if (magnitude >= 0x7c00u) {  // Inf, NaN
    const uint32_t u = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    __builtin_memcpy(&f, &u, sizeof f);
  } else if (magnitude >= 0x0400u) {
    const uint32_t u = sign | ((magnitude << 13) + (112u << 23));
    __builtin_memcpy(&f, &u, sizeof f);
  } else {  // subnormal: a multiple of 2^-24
    f = static_cast<float>(magnitude) * 0x1p-24f;
    if (sign != 0) f = -f;
  }
  return f;
}

template <class F, class T>
FASTFS_HD T load_one(const char* p) {
  if constexpr (same_dtype<F, F64>::value) {
    double x;
    __builtin_memcpy(&x, p, sizeof x);
    return static_cast<T>(x);
  } else if constexpr (same_dtype<F, F32>::value) {
    float x;
    __builtin_memcpy(&x, p, sizeof x);
    return static_cast<T>(x);
  } else {
    uint16_t h;
    __builtin_memcpy(&h, p, sizeof h);
    if constexpr (same_dtype<F, F16>::value) return static_cast<T>(half_to_float(h));
    const uint32_t u = static_cast<uint32_t>(h) << 16;
    float x;
    __builtin_memcpy(&x, &u, sizeof x);
    return static_cast<T>(x);
  }
}

template <class T>
struct Vec {
  static constexpr int kLanes = 16;
  T v[kLanes];
  FASTFS_HD static Vec zero() { return {}; }
  FASTFS_HD static Vec splat(double x) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<T>(x);
    return r;
  }
  template <class F>
  FASTFS_HD static Vec load(const char* p) {
    constexpr int size = same_dtype<F, F64>::value ? 8 : same_dtype<F, F32>::value ? 4 : 2;
    Vec r;
#pragma GCC unroll 1
    for (int i = 0; i < kLanes; ++i) r.v[i] = load_one<F, T>(p + i * size);
    return r;
  }
  FASTFS_HD void add_to(double* t) const {
#pragma GCC unroll 1
    for (int i = 0; i < kLanes; ++i) t[i] += static_cast<double>(v[i]);
  }
};
using Single = Vec<float>;
using Double = Vec<double>;

#define FASTFS_LANES(expression)                                                        \
  Vec<T> r;                                                                             \
  _Pragma("GCC unroll 1") for (int i = 0; i < Vec<T>::kLanes; ++i) r.v[i] = expression; \
  return r

template <class T>
FASTFS_HD Vec<T> add(const Vec<T>& a, const Vec<T>& b) {
  FASTFS_LANES(a.v[i] + b.v[i]);
}
template <class T>
FASTFS_HD Vec<T> sub(const Vec<T>& a, const Vec<T>& b) {
  FASTFS_LANES(a.v[i] - b.v[i]);
}
template <class T>
FASTFS_HD Vec<T> mul(const Vec<T>& a, const Vec<T>& b) {
  FASTFS_LANES(a.v[i] * b.v[i]);
}
template <class T>
FASTFS_HD Vec<T> quotient(const Vec<T>& a, const Vec<T>& b) {
  FASTFS_LANES(a.v[i] / b.v[i]);
}
template <class T>
FASTFS_HD Vec<T> root(const Vec<T>& a) {
  FASTFS_LANES(fastfs::root(a.v[i]));
}
template <class T>
FASTFS_HD Vec<T> mul_add(const Vec<T>& a, const Vec<T>& b, const Vec<T>& c) {
  FASTFS_LANES(fastfs::mul_add(a.v[i], b.v[i], c.v[i]));
}
template <class T>
FASTFS_HD Vec<T> absolute(const Vec<T>& a) {
  FASTFS_LANES(fastfs::absolute(a.v[i]));
}
template <class T>
FASTFS_HD Vec<T> scaled(const Vec<T>& a, double s) {
  FASTFS_LANES(fastfs::scaled(a.v[i], s));
}
template <class T>
FASTFS_HD Vec<T> exponent_part(const Vec<T>& a) {
  FASTFS_LANES(fastfs::exponent_part(a.v[i]));
}
template <class T>
FASTFS_HD Vec<T> where_at_least(const Vec<T>& a, double bound, const Vec<T>& value, double otherwise) {
  FASTFS_LANES(fastfs::where_at_least(a.v[i], bound, value.v[i], otherwise));
}
#undef FASTFS_LANES
}  // namespace

template <>
struct is_single<Single> {
  static constexpr bool value = true;
};

namespace cpu {
namespace {
constexpr int kUnroll = 1;
#include "loops_impl.h"
}  // namespace

const Loops& loops_generic() {
  static constexpr Loops loops{"generic", kTables, &read};
  return loops;
}
}  // namespace cpu
}  // namespace fastfs
