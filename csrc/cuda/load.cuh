// Reading the inputs of a chunk, a run of eight consecutive elements at a time (four of double), whatever their
// alignment and strides. Which thread takes which element depends on neither; an element beyond the end reads as zero,
// and adds nothing to any sum.
#pragma once

#include "policy.cuh"
#include "table.cuh"

namespace fastfs::cuda {

// Dtypes that are known at run time alone, so that slow paths and rare combinations share a kernel.
//   Any        f16, bf16 or f32, of the first inputs, of the last one or of both, computed in float. A last input may
//              also be f64, in single elements.
//   AnyDouble  all four, of the last input beside first inputs of f64, computed in double.
struct Any {};
struct AnyDouble {};

template <class T>
struct Storage {
  static constexpr int kSize = 4;  // bytes of an element; of Any and AnyDouble: of a value in a run
};
template <>
struct Storage<F16> {
  static constexpr int kSize = 2;
};
template <>
struct Storage<BF16> {
  static constexpr int kSize = 2;
};
template <>
struct Storage<F64> {
  static constexpr int kSize = 8;
};
template <>
struct Storage<AnyDouble> {
  static constexpr int kSize = 8;
};
template <class T>
constexpr bool kRunTime = std::is_same_v<T, Any> || std::is_same_v<T, AnyDouble>;
// Elements that a thread reads at a time, where F is the dtype of the first inputs.
template <class F>
constexpr int kRun = Storage<F>::kSize == 8 ? 4 : 8;
template <class T, int E>
constexpr int kWordsOf = E * Storage<T>::kSize / 4;  // 32-bit words of E elements

template <class To, class From>
__device__ __forceinline__ To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

__device__ __forceinline__ float f16_value(uint32_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(half)));
  return value;
#else
  return static_cast<float>(bits<_Float16>(static_cast<uint16_t>(half)));
#endif
}
__device__ __forceinline__ float bf16_value(uint32_t half) { return bits<float>(half << 16); }

// Element i of a run in its words.
template <class T>
__device__ __forceinline__ auto value_of(const uint32_t* w, int i) {
  if constexpr (std::is_same_v<T, F16>) {
    return f16_value(w[i / 2] >> (i % 2 * 16) & 0xffffu);
  } else if constexpr (std::is_same_v<T, BF16>) {
    return bits<float>(i % 2 == 0 ? w[i / 2] << 16 : w[i / 2] & 0xffff0000u);
  } else if constexpr (Storage<T>::kSize == 8) {
    return bits<double>(static_cast<uint64_t>(w[2 * i + 1]) << 32 | w[2 * i]);
  } else {
    return bits<float>(w[i]);
  }
}

// One element on its own.
template <class T>
__device__ __forceinline__ double element_at(const char* p, DType any) {
  if constexpr (std::is_same_v<T, F16>) {
    return f16_value(__ldg(reinterpret_cast<const uint16_t*>(p)));
  } else if constexpr (std::is_same_v<T, BF16>) {
    return bf16_value(__ldg(reinterpret_cast<const uint16_t*>(p)));
  } else if constexpr (std::is_same_v<T, F32>) {
    return __ldg(reinterpret_cast<const float*>(p));
  } else if constexpr (std::is_same_v<T, F64>) {
    return __ldg(reinterpret_cast<const double*>(p));
  } else {
    switch (any) {
      case DType::f16:
        return element_at<F16>(p, any);
      case DType::bf16:
        return element_at<BF16>(p, any);
      case DType::f32:
        return element_at<F32>(p, any);
      default:
        return element_at<F64>(p, any);
    }
  }
}
template <class T>
__device__ __forceinline__ int size_of(DType any) {
  if constexpr (kRunTime<T>) {
    return any == DType::f64 ? 8 : any == DType::f32 ? 4 : 2;
  } else {
    return Storage<T>::kSize;
  }
}

__device__ __forceinline__ bool aligned(const char* p, int bytes) {
  return (reinterpret_cast<uintptr_t>(p) & static_cast<uintptr_t>(bytes - 1)) == 0;
}

// Loads of 16 bytes, the Load of a policy: through the read-only path; evicted first.
struct ReadOnlyLoad {
  __device__ __forceinline__ static uint4 words(const uint4* p) { return __ldg(p); }
};
struct StreamingLoad {
  __device__ __forceinline__ static uint4 words(const uint4* p) { return __ldcs(p); }
};

// kWords words by loads of 16 bytes (of 8 if they are two); p is a multiple of that.
template <int kWords, class Load>
__device__ __forceinline__ void load_wide(const char* p, uint32_t* w) {
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i) {
    const uint4 q = Load::words(reinterpret_cast<const uint4*>(p) + i);
    w[4 * i] = q.x, w[4 * i + 1] = q.y, w[4 * i + 2] = q.z, w[4 * i + 3] = q.w;
  }
  if constexpr (kWords == 2) {
    const uint2 q = __ldg(reinterpret_cast<const uint2*>(p));
    w[0] = q.x, w[1] = q.y;
  }
}
// ... by the widest loads that the alignment of p allows.
template <int kWords, int kSize, class Load>
__device__ __forceinline__ void load_aligned(const char* p, uint32_t* w) {
  if (kWords % 4 == 0 && aligned(p, 16)) {
    load_wide<kWords, Load>(p, w);
  } else if (aligned(p, 8)) {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      const uint2 q = __ldg(reinterpret_cast<const uint2*>(p) + i);
      w[2 * i] = q.x, w[2 * i + 1] = q.y;
    }
  } else if (kSize == 4 || (kSize == 2 && aligned(p, 4))) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) w[i] = __ldg(reinterpret_cast<const uint32_t*>(p) + i);
  } else if (kSize == 2) {
    const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
#pragma unroll
    for (int i = 0; i < kWords; ++i) w[i] = __ldg(h + 2 * i) | static_cast<uint32_t>(__ldg(h + 2 * i + 1)) << 16;
  }
}
// Element i of a run at p + i * step for i < valid, zeros for the rest.
template <int kWords, int kSize>
__device__ __forceinline__ void load_elements(const char* p, int64_t step, int valid, uint32_t* w) {
#pragma unroll
  for (int i = 0; i < kWords * 4 / kSize; ++i) {
    const char* q = p + i * step;
    if constexpr (kSize == 2) {
      const uint32_t half = i < valid ? __ldg(reinterpret_cast<const uint16_t*>(q)) : 0u;
      w[i / 2] = i % 2 == 0 ? half : w[i / 2] | half << 16;
    } else if constexpr (kSize == 4) {
      w[i] = i < valid ? __ldg(reinterpret_cast<const uint32_t*>(q)) : 0u;
    } else {
      const uint2 pair = i < valid ? __ldg(reinterpret_cast<const uint2*>(q)) : uint2{0u, 0u};
      w[2 * i] = pair.x, w[2 * i + 1] = pair.y;
    }
  }
}
// Drops the first element of a run and appends the one at p.
template <int kWords, int kSize>
__device__ __forceinline__ void push_element(const char* p, bool valid, uint32_t* w) {
  constexpr int kShift = kSize == 8 ? 2 : 1;
#pragma unroll
  for (int i = 0; i + kShift < kWords; ++i) w[i] = kSize == 2 ? w[i] >> 16 | w[i + 1] << 16 : w[i + kShift];
  if constexpr (kSize == 2) {
    w[kWords - 1] >>= 16;
    if (valid) w[kWords - 1] |= static_cast<uint32_t>(__ldg(reinterpret_cast<const uint16_t*>(p))) << 16;
  } else if constexpr (kSize == 4) {
    w[kWords - 1] = valid ? __ldg(reinterpret_cast<const uint32_t*>(p)) : 0u;
  } else {
    const uint2 pair = valid ? __ldg(reinterpret_cast<const uint2*>(p)) : uint2{0u, 0u};
    w[kWords - 2] = pair.x, w[kWords - 1] = pair.y;
  }
}

// The ways to read a run of E elements of one input, with the dtype known now or at run time. Elements of a dtype known
// at run time fill the first words until widen() spreads them.
template <class T, int E, class Load>
struct Reader {
  static constexpr int kWords = kWordsOf<T, E>, kSize = Storage<T>::kSize;
  static constexpr bool kAny = kRunTime<T>, kDouble = kSize == 8;

  __device__ __forceinline__ static void wide(const char* p, DType any, uint32_t (&w)[kWords]) {
    if constexpr (kAny && !kDouble) {  // of AnyDouble, f64 alone
      load_wide<E / 2, Load>(p, w);
      if (any == DType::f32) load_wide<E / 2, Load>(p + 2 * E, w + E / 2);
    } else {
      load_wide<kWords, Load>(p, w);
    }
  }
  __device__ __forceinline__ static void run(const char* p, DType any, uint32_t (&w)[kWords]) {
    if constexpr (kAny) {
      if (kDouble && any == DType::f64) {
        load_aligned<kWords, 8, Load>(p, w);
      } else if (any == DType::f32) {
        load_aligned<E, 4, Load>(p, w);
      } else {
        load_aligned<E / 2, 2, Load>(p, w);
      }
    } else {
      load_aligned<kWords, kSize, Load>(p, w);
    }
  }
  __device__ __forceinline__ static void elements(const char* p, int64_t step, int valid, DType any,
                                                  uint32_t (&w)[kWords]) {
    if constexpr (kAny) {
      if (kDouble && any == DType::f64) {
        load_elements<kWords, 8>(p, step, valid, w);
      } else if (any == DType::f32) {
        load_elements<E, 4>(p, step, valid, w);
      } else {
        load_elements<E / 2, 2>(p, step, valid, w);
      }
    } else {
      load_elements<kWords, kSize>(p, step, valid, w);
    }
  }
  __device__ __forceinline__ static void push(const char* p, bool valid, DType any, uint32_t (&w)[kWords]) {
    if constexpr (kAny) {
      if (kDouble && any == DType::f64) {
        push_element<kWords, 8>(p, valid, w);
      } else if (any == DType::f32) {
        push_element<E, 4>(p, valid, w);
      } else {
        push_element<E / 2, 2>(p, valid, w);
      }
    } else {
      push_element<kWords, kSize>(p, valid, w);
    }
  }
};

// Turns what was loaded into words of T: of Any into those of float, of AnyDouble into those of double.
template <class T, int E>
__device__ __forceinline__ void widen(DType any, uint32_t (&w)[kWordsOf<T, E>]) {
  if constexpr (std::is_same_v<T, AnyDouble>) {
    if (any == DType::f64) return;
#pragma unroll
    for (int i = E - 1; i >= 0; --i) {
      const uint32_t half = w[i / 2] >> (i % 2 * 16) & 0xffffu;
      const float x = any == DType::f32 ? bits<float>(w[i]) : any == DType::f16 ? f16_value(half) : bf16_value(half);
      const uint64_t u = bits<uint64_t>(static_cast<double>(x));
      w[2 * i] = static_cast<uint32_t>(u), w[2 * i + 1] = static_cast<uint32_t>(u >> 32);
    }
  }
  if constexpr (std::is_same_v<T, Any>) {
    if (any == DType::f16) {
#pragma unroll
      for (int i = E - 1; i >= 0; --i) w[i] = bits<uint32_t>(f16_value(w[i / 2] >> (i % 2 * 16) & 0xffffu));
    } else if (any == DType::bf16) {
#pragma unroll
      for (int i = E - 1; i >= 0; --i) w[i] = i % 2 == 0 ? w[i / 2] << 16 : w[i / 2] & 0xffff0000u;
    }
  }
}

// Calls call(format) with the dtype of the first inputs as a type. Terms that depend on it do so by the spacing of the
// format, which is the same in float for bf16 and f32 but for a factor.
template <class F, class V, class Call>
__device__ __forceinline__ void visit_format(DType first, const Call& call) {
  if constexpr (!std::is_same_v<F, Any>) {
    call(F{});
  } else if (first == DType::f16) {
    call(F16{});
  } else if (!is_single<V>::value && first == DType::bf16) {
    call(BF16{});
  } else {
    call(F32{});
  }
}

// A run of every input: all of dtype F but the last.
template <class Sums, class F, class L>
struct Run {
  static constexpr int kInputs = Sums::kInputs;
  uint32_t first[kInputs - 1][kWordsOf<F, kRun<F>>];
  uint32_t last[kWordsOf<L, kRun<F>>];

  template <class V>
  __device__ __forceinline__ void values(int i, V (&x)[kInputs]) const {
#pragma unroll
    for (int j = 0; j < kInputs - 1; ++j) x[j] = static_cast<V>(value_of<F>(first[j], i));
    x[kInputs - 1] = static_cast<V>(value_of<L>(last, i));
  }
};

// The inputs of a chunk whose layer is contiguous: element i of the chunk lies at p[j] + i * size.
template <class Sums, class F, class L, class Load>
struct DenseSource {
  static constexpr int kInputs = Sums::kInputs, E = kRun<F>;
  const char* p[kInputs];
  DType any;
  int count;
  static constexpr DType first{};  // known by F

  template <class Table>
  __device__ __forceinline__ DenseSource(const Table& table, const Item& item)
      : any(table.launch.last), count(item.count) {
#pragma unroll
    for (int j = 0; j < kInputs; ++j) p[j] = table.entry[item.entry].data[j] + item.begin * size(j);
  }
  __device__ __forceinline__ int size(int j) const { return j == kInputs - 1 ? size_of<L>(any) : Storage<F>::kSize; }
  __device__ __forceinline__ bool wide() const {
    bool all = true;
#pragma unroll
    for (int j = 0; j < kInputs; ++j) all = all && aligned(p[j], 16);
    return all;
  }
  // Elements at .. at + E - 1, all of them inside, every input a multiple of 16 bytes.
  __device__ __forceinline__ void load(int at, Run<Sums, F, L>& e) const {
#pragma unroll
    for (int j = 0; j < kInputs - 1; ++j) Reader<F, E, Load>::wide(p[j] + at * size(j), any, e.first[j]);
    Reader<L, E, Load>::wide(p[kInputs - 1] + at * size(kInputs - 1), any, e.last);
  }
  // Tiles of a chain, where F has at most `most`.
  __device__ __forceinline__ static constexpr int tiles(int most) { return most; }
  // ... whatever the alignment, with zeros from element `count` on.
  __device__ __forceinline__ void load_some(int at, Run<Sums, F, L>& e) const {
#pragma unroll
    for (int j = 0; j < kInputs - 1; ++j) load_one<F>(p[j] + at * size(j), size(j), at, e.first[j]);
    load_one<L>(p[kInputs - 1] + at * size(kInputs - 1), size(kInputs - 1), at, e.last);
  }
  // Element `at` of every input.
  __device__ __forceinline__ void elements(int at, double (&x)[kInputs]) const {
#pragma unroll
    for (int j = 0; j < kInputs; ++j) {
      const char* q = p[j] + at * size(j);
      x[j] = j == kInputs - 1 ? element_at<L>(q, any) : element_at<F>(q, any);
    }
  }

 private:
  template <class T>
  __device__ __forceinline__ void load_one(const char* q, int step, int at, uint32_t (&w)[kWordsOf<T, E>]) const {
    if (at + E <= count) {
      Reader<T, E, Load>::run(q, any, w);
    } else {
      Reader<T, E, Load>::elements(q, step, count - at, any, w);
    }
  }
};

}  // namespace fastfs::cuda
