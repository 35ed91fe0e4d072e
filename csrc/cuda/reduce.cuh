// Sums over the threads of a warp, and the last-block finish over the chunks of a segment, all in the order of the
// index.
#pragma once

#include "table.cuh"

namespace fastfs::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Sums each of N values over the 32 lanes of a warp: lane l returns the total of value l / (32 / N). While
// values are left a lane hands half of them to its partner, so N - 1 + 5 - log2(N) exchanges do instead of 5 N.
template <int N>
__device__ __forceinline__ double warp_sums(double (&v)[N], int lane) {
  static_assert(N >= 2 && N <= 32 && (N & (N - 1)) == 0,
                "lanes hand over half of their values at a time: N has to be a power of two from 2 to 32; kSlots in "
                "segment_sums.cuh chooses it");
  int offset = 16;
#pragma unroll
  for (int half = N / 2; half >= 1; half /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const double keep = upper ? v[i + half] : v[i];
      const double give = upper ? v[i] : v[i + half];
      v[i] = keep + __shfl_xor_sync(kFullWarp, give, offset);
    }
  }
#pragma unroll
  for (offset = 16 / N; offset >= 1; offset /= 2) v[0] += __shfl_xor_sync(kFullWarp, v[0], offset);
  return v[0];
}

// Sums `count` partial results of N values, `step` partials apart, in index order: lane l returns the total of value
// l % N. Lane l adds partials l / N, l / N + 32 / N, ... and then the 32 / N lanes of a value are added pairwise.
template <int N>
__device__ __forceinline__ double sum_partials(const double* partials, int64_t count, int64_t step, int lane) {
  double v = 0.0;
#pragma unroll 4
  for (int64_t i = lane / N; i < count; i += 32 / N) v += __ldcg(partials + i * step * N + lane % N);
#pragma unroll
  for (int offset = N; offset < 32; offset *= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// One row of the result: lane k < kValues writes value k, lane kValues the count.
template <int kValues>
__device__ __forceinline__ void write_row(double* row, double value, int64_t count, int lane) {
  if (lane < kValues) row[lane] = value;
  if (lane == kValues) row[kValues] = static_cast<double>(count);
}

// Counts this warp in at a ticket that `expected` warps take; true (in every lane) for the last one, which then sees
// what the others had written before. The ticket wraps to zero, ready for the next launch.
__device__ __forceinline__ bool arrive_last(uint32_t* ticket, int64_t expected, int lane) {
  const unsigned last = static_cast<unsigned>(expected - 1);
  unsigned before = 0;
  __threadfence();
  __syncwarp();
  if (lane == 0) {
    before = atomicInc(ticket, last);
    __threadfence();
  }
  __syncwarp();
  return __shfl_sync(kFullWarp, before, 0) == last;
}

// Takes the sums of one chunk (lane l of the calling warp holds value l % N) to the result.
//
//   chunk     0 1 2 ... 63 | 64 ... 127 | 128 ... 140    partials[first + chunk], written by the block of the chunk
//   group     0            | 1          | 2              the last block of a group sums its partials in index order
//                                                        into the slot of the group's first chunk
//   segment   row of sums                                the last group of a segment sums those slots likewise
//
// Tickets: of a group at the item of its first chunk, of the segment at the item of its second chunk. Of the N values
// the first kValues are results.
template <int N, int kValues>
__device__ __forceinline__ void finish(const Launch& launch, int64_t item, const Item& at, int64_t width, double* row,
                                       double value, int lane) {
  if (at.chunks > 1) {
    const int64_t first = item - at.chunk, group = at.chunk / kGroupChunks, leader = first + group * kGroupChunks;
    const int64_t members = min64(kGroupChunks, at.chunks - group * kGroupChunks);
    if (lane < N) launch.partials[item * N + lane] = value;
    if (!arrive_last(launch.tickets + leader, members, lane)) return;
    value = sum_partials<N>(launch.partials + leader * N, members, 1, lane);
    const int64_t groups = (at.chunks + kGroupChunks - 1) / kGroupChunks;
    if (groups > 1) {
      if (lane < N) launch.partials[leader * N + lane] = value;
      if (!arrive_last(launch.tickets + first + 1, groups, lane)) return;
      value = sum_partials<N>(launch.partials + first * N, groups, kGroupChunks, lane);
    }
  }
  write_row<kValues>(row, value, width, lane);
}

}  // namespace fastfs::cuda
