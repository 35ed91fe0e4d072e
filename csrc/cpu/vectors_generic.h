// Any processor: plain loops over 16 lanes, which the compiler vectorises as far as its baseline allows. Without fused
// multiply-add in the baseline (x86-64) fmaf is a call: right and slow, for machines older than AVX2.
//
// The vectors of an instruction set, one header each, for loops_impl.h and row_loops_impl.h: Single and Double, one
// register of float and of double, with the arithmetic of arithmetic.h and
//   kLanes         elements of a register; both loops compute with cpu::kLanes lanes, in as many registers as it takes
//   load<F>(p)     kLanes elements of the storage dtype F
//   store<To>(p)   Single only: casts to To, rounding to nearest even. A NaN becomes 0x7fc0 in bfloat16; in float16 it
//                  keeps its sign and upper digits, as in the processor's instruction.
//   add_to(t)      adds the lanes to kLanes doubles in memory
//   add_to(t, x)   adds the lanes of the Single x to the first registers of Double at t
//   sum_of_lanes   of a Double, as a fixed tree
#pragma once

#include "../arithmetic.h"

namespace fastfs {
namespace {

template <class To, class From>
FASTFS_HD To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

FASTFS_HD float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // Inf, NaN; a NaN becomes a quiet one
    const uint32_t digits = magnitude & 0x3ffu;
    return bits<float>(sign | 0x7f800000u | digits << 13 | (digits != 0 ? 0x400000u : 0u));
  }
  if (magnitude >= 0x0400u) return bits<float>(sign | ((magnitude << 13) + (112u << 23)));
  return bits<float>(sign | bits<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));  // subnormal
}

FASTFS_HD uint16_t to_f16(float f) {
  const uint32_t u = bits<uint32_t>(f);
  const uint32_t sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or more
    h = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: at least 2^-14
    h = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {  // a multiple of 2^-24: the addition rounds it to one
    h = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  }
  return static_cast<uint16_t>(sign | h);
}

FASTFS_HD uint16_t to_bf16(float f) {
  const uint32_t u = bits<uint32_t>(f);
  return static_cast<uint16_t>(f != f ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

template <class F>
struct stored {
  using type = uint16_t;
};
template <>
struct stored<F32> {
  using type = float;
};
template <>
struct stored<F64> {
  using type = double;
};

template <class F>
FASTFS_HD auto value_at(const char* p, int i) {
  typename stored<F>::type x;
  __builtin_memcpy(&x, p + i * sizeof x, sizeof x);
  if constexpr (std::is_same_v<F, F16>) {
    return from_f16(x);
  } else if constexpr (std::is_same_v<F, BF16>) {
    return bits<float>(static_cast<uint32_t>(x) << 16);
  } else {
    return x;
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
    Vec r;
#pragma GCC unroll 1
    for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<T>(value_at<F>(p, i));
    return r;
  }
  template <class To>
  FASTFS_HD void store(char* p) const {
    typename stored<To>::type out[kLanes];
#pragma GCC unroll 1
    for (int i = 0; i < kLanes; ++i) {
      if constexpr (std::is_same_v<To, F16>) {
        out[i] = to_f16(v[i]);
      } else if constexpr (std::is_same_v<To, BF16>) {
        out[i] = to_bf16(v[i]);
      } else {
        out[i] = v[i];
      }
    }
    __builtin_memcpy(p, out, sizeof out);
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
FASTFS_HD Vec<T> larger(const Vec<T>& a, double bound) {
  FASTFS_LANES(fastfs::larger(a.v[i], bound));
}
template <class T>
FASTFS_HD Vec<T> where_at_least(const Vec<T>& a, double bound, const Vec<T>& value, double otherwise) {
  FASTFS_LANES(fastfs::where_at_least(a.v[i], bound, value.v[i], otherwise));
}
#undef FASTFS_LANES
FASTFS_HD void add_to(Double* t, const Single& x) { x.add_to(t->v); }
FASTFS_HD double sum_of_lanes(Double a) {
  for (int width = Double::kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  }
  return a.v[0];
}
}  // namespace

template <>
struct is_single<Single> {
  static constexpr bool value = true;
};

}  // namespace fastfs
