// Any processor: plain loops over 16 lanes, which the compiler vectorises as far as its baseline allows.
#include "../rows.h"
#include "row_loops.h"

namespace fastfs::cpu {
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
FASTFS_HD auto value(const char* p, int i) {
  typename stored<F>::type x;
  __builtin_memcpy(&x, p + i * sizeof x, sizeof x);
  if constexpr (same_dtype<F, F16>::value) {
    return from_f16(x);
  } else if constexpr (same_dtype<F, BF16>::value) {
    return bits<float>(static_cast<uint32_t>(x) << 16);
  } else {
    return x;
  }
}

#define FASTFS_EACH _Pragma("GCC unroll 1") for (int i = 0; i < kLanes; ++i)

struct Floats {
  float v[kLanes];
  FASTFS_HD static Floats zero() { return {}; }
  template <class F>
  FASTFS_HD static Floats load(const char* p) {
    Floats r;
    FASTFS_EACH r.v[i] = static_cast<float>(value<F>(p, i));
    return r;
  }
  template <class To>
  FASTFS_HD void store(char* p) const {
    typename stored<To>::type out[kLanes];
    FASTFS_EACH {
      if constexpr (same_dtype<To, F16>::value) {
        out[i] = to_f16(v[i]);
      } else if constexpr (same_dtype<To, BF16>::value) {
        out[i] = to_bf16(v[i]);
      } else {
        out[i] = v[i];
      }
    }
    __builtin_memcpy(p, out, sizeof out);
  }
  FASTFS_HD void add_square(const Floats& x) { FASTFS_EACH v[i] += x.v[i] * x.v[i]; }
};

struct Doubles {
  double v[kLanes];
  FASTFS_HD static Doubles zero() { return {}; }
  template <class F>
  FASTFS_HD static Doubles load(const char* p) {
    Doubles r;
    FASTFS_EACH r.v[i] = value<F>(p, i);
    return r;
  }
  FASTFS_HD void add_square(const Doubles& x) { FASTFS_EACH v[i] += x.v[i] * x.v[i]; }
  template <class V>
  FASTFS_HD void add(const V& x) {
    FASTFS_EACH v[i] += x.v[i];
  }
  FASTFS_HD double sum() const {
    Doubles t = *this;
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) t.v[i] += t.v[i + width];
    }
    return t.v[0];
  }
};
#undef FASTFS_EACH

constexpr int kRowUnroll = 1;
#include "row_loops_impl.h"
}  // namespace

const RowLoops kRowsGeneric = kRowTable;

}  // namespace fastfs::cpu
