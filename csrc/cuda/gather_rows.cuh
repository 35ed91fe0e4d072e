// Copy, cast and squares of rows in one pass.
//
//   item      a chunk of a kept row: the whole row, unless it is wider than kChunk
//   team      a warp for rows of up to Order::kGatherWarpRow elements, else a block: it takes one item after the other
//   thread    runs of E = 8 consecutive elements (4 of double), the team's threads side by side; two runs of floats
//             are one chain of additions, which is added to the thread's double
//
// The squares of a team's threads are added in a fixed tree. So bits depend on neither grid, alignment nor strides.
#pragma once

#include "../rows.h"
#include "load.cuh"
#include "reduce.cuh"
#include "runtime.h"

namespace fastfs::cuda {

// Dimensions that are walked row-major.
struct Walk {
  int dims;
  int64_t shape[kMaxDims], stride[kMaxDims];  // strides in elements
};

// The parameters of a launch, by value.
struct RowJob {
  const char* data;
  const int64_t* index;
  int64_t index_stride;
  int64_t rows, width;
  int64_t kept, chunks;  // chunks of a row
  char* to;              // null: squares alone
  double* squares;       // of every item
  int team;              // threads
  DType to_dtype;
  bool contiguous;  // a row has no gaps
  Walk row, within;
};

// A NaN of a dtype, as the bits of one element.
__device__ __forceinline__ uint64_t nan_bits(DType d) {
  switch (d) {
    case DType::f16:
      return 0x7e00u;
    case DType::bf16:
      return 0x7fc0u;
    case DType::f32:
      return 0x7fc00000u;
    default:
      return 0x7ff8000000000000u;
  }
}

__device__ __forceinline__ uint32_t to_f16(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
#else
  return bits<uint16_t>(static_cast<_Float16>(x));
#endif
}
__device__ __forceinline__ uint32_t to_bf16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return x != x ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}

// Writes the first `valid` elements of a run, of kSize bytes each, by the widest stores that alignment allows.
template <int kWords, int kSize>
__device__ __forceinline__ void store_words(char* p, const uint32_t* w, int valid) {
  constexpr int E = kWords * 4 / kSize;
  if (valid == E && kWords % 4 == 0 && aligned(p, 16)) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      reinterpret_cast<uint4*>(p)[i] = uint4{w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]};
    }
    return;
  }
  if (valid == E && aligned(p, 8)) {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) reinterpret_cast<uint2*>(p)[i] = uint2{w[2 * i], w[2 * i + 1]};
    return;
  }
#pragma unroll
  for (int i = 0; i < E; ++i) {
    if (i >= valid) break;
    if constexpr (kSize == 2) {
      reinterpret_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(w[i / 2] >> (i % 2 * 16));
    } else if constexpr (kSize == 4) {
      reinterpret_cast<uint32_t*>(p)[i] = w[i];
    } else {
      reinterpret_cast<uint2*>(p)[i] = uint2{w[2 * i], w[2 * i + 1]};
    }
  }
}

// Casts a run of F to `to_dtype` and writes it. Between float64 and the 16-bit formats by way of float, as torch does.
template <class F>
__device__ __forceinline__ void store_run(char* p, DType to_dtype, const uint32_t* w, int valid) {
  constexpr int E = kRun<F>;
  float f[E];
#pragma unroll
  for (int i = 0; i < E; ++i) f[i] = static_cast<float>(value_of<F>(w, i));
  if (to_dtype == DType::f16 || to_dtype == DType::bf16) {
    uint32_t out[E / 2];
#pragma unroll
    for (int i = 0; i < E / 2; ++i) {
      out[i] = to_dtype == DType::f16 ? to_f16(f[2 * i]) | to_f16(f[2 * i + 1]) << 16
                                      : to_bf16(f[2 * i]) | to_bf16(f[2 * i + 1]) << 16;
    }
    store_words<E / 2, 2>(p, out, valid);
  } else if (to_dtype == DType::f32) {
    uint32_t out[E];
#pragma unroll
    for (int i = 0; i < E; ++i) out[i] = bits<uint32_t>(f[i]);
    store_words<E, 4>(p, out, valid);
  } else {
    uint32_t out[2 * E];
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const uint64_t u = bits<uint64_t>(static_cast<double>(f[i]));
      out[2 * i] = static_cast<uint32_t>(u);
      out[2 * i + 1] = static_cast<uint32_t>(u >> 32);
    }
    store_words<2 * E, 8>(p, out, valid);
  }
}

template <class F>
struct dtype_tag;
template <>
struct dtype_tag<F16> {
  static constexpr DType value = DType::f16;
};
template <>
struct dtype_tag<BF16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct dtype_tag<F32> {
  static constexpr DType value = DType::f32;
};
template <>
struct dtype_tag<F64> {
  static constexpr DType value = DType::f64;
};

// One kept row, from element `begin` of it on.
template <class F, class Load>
struct RowSource {
  static constexpr int E = kRun<F>, kSize = Storage<F>::kSize, kWords = kWordsOf<F, E>;
  const RowJob& job;
  const char* p;  // element 0 of the row
  int64_t begin;
  int count;

  // Elements at .. at + E - 1 of the item, zeros beyond its end; says how many there are.
  __device__ __forceinline__ int load(int at, uint32_t (&w)[kWords]) const {
    const int valid = count - at < 0 ? 0 : count - at < E ? count - at : E;
    if (job.contiguous) {
      const char* const q = p + (begin + at) * kSize;
      if (valid == E) {
        load_aligned<kWords, kSize, Load>(q, w);
      } else {
        load_elements<kWords, kSize>(q, kSize, valid, w);
      }
      return valid;
    }
    const Walk& walk = job.within;
    const int last = walk.dims - 1;
    const int64_t length = walk.shape[last], step = walk.stride[last] * kSize;
    int64_t i = begin + at, inner = i, offset = walk.dims == 1 ? i * step : 0;
    if (walk.dims > 1 && valid > 0) offset = row_offset(walk, i) * kSize, inner = i % length;
    if (inner + valid <= length) {
      load_elements<kWords, kSize>(p + offset, step, valid, w);
      return valid;
    }
#pragma unroll
    for (int k = 0; k < kWords; ++k) w[k] = 0;
#pragma unroll 1
    for (int e = 0; e < E; ++e) {
      push_element<kWords, kSize>(p + offset, e < valid, w);
      offset += step;
      if (++inner == length && e + 1 < valid) offset = row_offset(walk, i + e + 1) * kSize, inner = 0;
    }
    return valid;
  }

  // Adds the squares of a run to a chain.
  template <class V>
  __device__ __forceinline__ static void add_run(const uint32_t (&w)[kWords], V& chain) {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const V x = static_cast<V>(value_of<F>(w, e));
      chain = add(chain, mul(x, x));
    }
  }
  __device__ __forceinline__ void store(char* to, int at, const uint32_t (&w)[kWords], int valid) const {
    char* const q = to + static_cast<int64_t>(at) * size_of<Any>(job.to_dtype);
    if (job.to_dtype == dtype_tag<F>::value) {
      store_words<kWords, kSize>(q, w, valid);
    } else {
      store_run<F>(q, job.to_dtype, w, valid);
    }
  }

  // This thread's squares, in chains of V, and its part of the copy.
  template <class V>
  __device__ __forceinline__ double take(char* to, int rank) const {
    constexpr int kTiles = kSize == 8 ? 1 : kChain / E;
    const int tile = job.team * E;
    double sum = 0.0;
#pragma unroll 1
    for (int at = rank * E; at < count; at += kTiles * tile) {
      V chain(0);
      if (is_single<V>::value && job.contiguous && at + (kTiles - 1) * tile + E <= count) {
        uint32_t w[kTiles][kWords];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) load_aligned<kWords, kSize, Load>(p + (begin + at + t * tile) * kSize, w[t]);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          add_run(w[t], chain);
          if (to != nullptr) store(to, at + t * tile, w[t], E);
        }
      } else {
#pragma unroll 1
        for (int t = 0; t < kTiles; ++t) {
          uint32_t w[kWords];
          const int valid = load(at + t * tile, w);
          add_run(w, chain);
          if (to != nullptr) store(to, at + t * tile, w, valid);
        }
      }
      sum += chain;
    }
    return sum;
  }
};

// Sum of one value of every thread of a team, known to all of them. Calls take turns with the two rows of `parts`, so
// that one barrier each will do.
template <int kWarps>
__device__ __forceinline__ double team_sum(double v, int team, double (&parts)[2][kWarps], int& side) {
#pragma unroll
  for (int offset = 16; offset >= 1; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  if (team == 32) return v;
  if (threadIdx.x % 32 == 0) parts[side][threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) v += parts[side][i];
  side ^= 1;
  return v;
}

template <class F, class Hub>
__global__ void __launch_bounds__(Hub::Order::kGatherThreads, Hub::Active::template GatherRows<F>::kBlocksPerSm)
    gather_rows_kernel(const __grid_constant__ RowJob job) {
  using Source = RowSource<F, typename Hub::Active::template GatherRows<F>::Load>;
  constexpr int kThreads = Hub::Order::kGatherThreads;
  using V = decltype(value_of<F>(nullptr, 0));  // float, but double for double
  __shared__ double parts[2][kThreads / 32];
  int side = 0;
  const int rank = static_cast<int>(threadIdx.x) % job.team, teams = kThreads / job.team;
  const int64_t items = job.kept * job.chunks;
  const int to_size = size_of<Any>(job.to_dtype);
#pragma unroll 1
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * teams + threadIdx.x / job.team; item < items;
       item += static_cast<int64_t>(gridDim.x) * teams) {
    const int64_t kept = job.chunks == 1 ? item : item / job.chunks, begin = (item - kept * job.chunks) * kChunk;
    const int count = static_cast<int>(min64(kChunk, job.width - begin));
    const int64_t row = __ldg(job.index + kept * job.index_stride);
    char* const to = job.to == nullptr ? nullptr : job.to + (kept * job.width + begin) * to_size;
    double sum;
    if (row >= 0 && row < job.rows) {
      const Source source{job, job.data + row_offset(job.row, row) * Storage<F>::kSize, begin, count};
      sum = team_sum(source.template take<V>(to, rank), job.team, parts, side);
      if (is_single<V>::value && squares_need_double(sum)) {
        sum = team_sum(source.template take<double>(nullptr, rank), job.team, parts, side);
      }
    } else {
      const uint64_t nan = nan_bits(job.to_dtype);
      sum = bits<double>(nan_bits(DType::f64));
      for (int i = rank; to != nullptr && i < count; i += job.team) {
        char* const q = to + static_cast<int64_t>(i) * to_size;
        if (to_size == 2) *reinterpret_cast<uint16_t*>(q) = static_cast<uint16_t>(nan);
        if (to_size == 4) *reinterpret_cast<uint32_t*>(q) = static_cast<uint32_t>(nan);
        if (to_size == 8) *reinterpret_cast<uint64_t*>(q) = nan;
      }
    }
    if (rank == 0) job.squares[item] = one_nan(sum);
  }
}

// The squares of rows from those of their chunks, in index order: a warp each.
struct MergeJob {
  const double* partials;
  double* squares;
  int64_t kept, chunks;
};
template <class Hub>
__global__ void __launch_bounds__(Hub::Order::kGatherThreads) merge_rows_kernel(const __grid_constant__ MergeJob job) {
  constexpr int kThreads = Hub::Order::kGatherThreads;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32; row < job.kept;
       row += static_cast<int64_t>(gridDim.x) * (kThreads / 32)) {
    const double sum = sum_by_warp(job.partials + row * job.chunks, job.chunks, lane);
    if (lane == 0) job.squares[row] = sum;
  }
}

}  // namespace fastfs::cuda
