// Sums over the threads of a warp, and the last-block finish over the chunks of a segment, all in the order of the
// index.
#pragma once

#include "table.cuh"

namespace fastfs::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Sums each of N values over the lanes of a team: 32, or less, a power of two from N on. Lane l of the team returns the
// total of value l / (team / N). While values are left a lane hands half of them to its partner, so that few exchanges
// do. All lanes of the warp have to call this.
template <int N>
__device__ __forceinline__ double team_sums(double (&v)[N], int lane, int team) {
  static_assert(N >= 2 && N <= 32 && (N & (N - 1)) == 0,
                "lanes hand over half of their values at a time: N has to be a power of two from 2 to 32; kSlots in "
                "segment_sums.cuh chooses it");
  int offset = team / 2;
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
#pragma unroll 1
  for (; offset >= 1; offset /= 2) v[0] += __shfl_xor_sync(kFullWarp, v[0], offset);
  return v[0];
}

// Sums one value of every warp of a block, in the order of the warps: lane l of the calling warp gets value l % N.
template <int N, int kWarps>
__device__ __forceinline__ double sum_warps(const double (&parts)[kWarps][N], int lane) {
  double v = 0.0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) v += parts[w][lane % N];
  return v;
}

// Sums `count` partial results of N values, 2^kStepBits partials apart, by a whole block: thread t adds two values of
// partials t / (N / 2), + kThreads / (N / 2), ... in that order, and the threads of a value are added up in a fixed
// tree. Warp 0 returns the total of value lane % N. `parts` must not be in use.
template <int kStepBits, int N, int kWarps>
__device__ __forceinline__ double sum_partials(const double* partials, int count, double (&parts)[kWarps][N],
                                               int thread) {
  static_assert(N >= 4 && N <= 32, "two values of a partial to a thread, and a partial to a warp at least");
  constexpr int kPairs = N / 2, kAtOnce = kWarps * 32 / kPairs, kBatch = 8;
  constexpr int64_t kStep = int64_t{kAtOnce * kPairs} << kStepBits;  // pairs
  const int lane = thread % 32, pair = thread % kPairs;
  const double2* from =
      reinterpret_cast<const double2*>(partials) + (int64_t{thread / kPairs * kPairs} << kStepBits) + pair;
  double a = 0.0, b = 0.0;
#pragma unroll 1
  for (int left = count - thread / kPairs; left > 0; left -= kBatch * kAtOnce, from += kBatch * kStep) {
    double2 two[kBatch];  // all of them under way before the first is added
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      two[j] = double2{0.0, 0.0};
      if (left > j * kAtOnce) two[j] = __ldcg(from + j * kStep);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) a += two[j].x, b += two[j].y;
  }
#pragma unroll
  for (int offset = kPairs; offset < 32; offset *= 2) {
    a += __shfl_xor_sync(kFullWarp, a, offset);
    b += __shfl_xor_sync(kFullWarp, b, offset);
  }
  if (lane < kPairs) {
    parts[thread / 32][2 * pair] = a;
    parts[thread / 32][2 * pair + 1] = b;
  }
  __syncthreads();
  return thread < 32 ? sum_warps(parts, lane) : 0.0;
}

// Sums `count` values by a warp, in index order: lane l adds values l, l + 32, ...
__device__ __forceinline__ double sum_by_warp(const double* values, int64_t count, int lane) {
  double v = 0.0;
#pragma unroll 4
  for (int64_t i = lane; i < count; i += 32) v += __ldcg(values + i);
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// Adds one to a ticket that wraps to zero after `last`, and returns what it was. Whatever this thread wrote or knew to
// be written before is visible to the thread that counts next, and what that thread's block does after a barrier.
__device__ __forceinline__ uint32_t count_in(uint32_t* ticket, uint32_t last) {
#if defined(__CUDA_ARCH__)
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(ticket)), "r"(last)
               : "memory");
  return before;
#else
  __threadfence();
  const uint32_t before = atomicInc(ticket, last);
  __threadfence();
  return before;
#endif
}

// Writes the partial result of this block (lane l of warp 0 holds value l % N) and counts the block in at a ticket that
// `expected` blocks take. True in every thread of the last one, which then sees what the others wrote; the ticket is
// zero again, ready for the next launch.
//
// Why it sees them: the lanes of warp 0 write, and __syncwarp orders that before lane 0 counts. The count releases and
// acquires at the scope of the GPU, and these are cumulative: the lane 0 that finds all others counted has the writes
// of all lanes behind it, and the barrier hands that on to its block. The reads bypass the L1 besides.
template <int N>
__device__ __forceinline__ bool arrive_last(double* partial, double value, uint32_t* ticket, int expected, int thread,
                                            int& is_last) {
  if (thread < 32) {
    if (thread < N) partial[thread] = value;
    __syncwarp();
    if (thread == 0) {
      const uint32_t last = static_cast<uint32_t>(expected - 1);
      is_last = count_in(ticket, last) == last;
    }
  }
  __syncthreads();
  return is_last;
}

// Takes the sums of one chunk to those of its segment. All threads of the block call it; lane l of warp 0 holds value
// l % N of the chunk, and of the segment if the result is true. True in the block that is the last of its segment.
//
//   chunk     0 1 2 ... 1023 | 1024 ... 2047 | 2048 ...   partials[first + chunk], written by the block of the chunk
//   group     0              | 1             | 2          the last block of a group sums its partials in index order
//                                                         into the slot of the group's first chunk
//   segment   row of sums                                 the last group of a segment sums those slots likewise
//
// Tickets: of a group at the item of its first chunk, of the segment at the item of its second chunk.
template <int kGroupBits, int N, int kWarps>
__device__ __forceinline__ bool finish(const Launch& launch, int64_t item, const Item& at, double& value,
                                       double (&parts)[kWarps][N], int& is_last) {
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int64_t kGroup = int64_t{1} << kGroupBits;
  const int64_t first = item - at.chunk, leader = first + (at.chunk >> kGroupBits << kGroupBits);
  const int members = static_cast<int>(min64(kGroup, first + at.chunks - leader));
  if (!arrive_last<N>(launch.partials + item * N, value, launch.tickets + leader, members, thread, is_last)) {
    return false;
  }
  value = sum_partials<0>(launch.partials + leader * N, members, parts, thread);
  if (at.chunks <= kGroup) return true;
  const int groups = static_cast<int>((at.chunks + kGroup - 1) >> kGroupBits);
  if (!arrive_last<N>(launch.partials + leader * N, value, launch.tickets + first + 1, groups, thread, is_last)) {
    return false;
  }
  value = sum_partials<kGroupBits>(launch.partials + first * N, groups, parts, thread);
  return true;
}

// One row of the result, by the lanes of a team, of which lane k < kValues holds value k; the count comes behind it.
template <int kValues>
__device__ __forceinline__ void write_row(double* row, double value, int64_t count, int lane, int team) {
  if (lane < kValues) row[lane] = value;
  if (lane == (kValues & (team - 1))) row[kValues] = static_cast<double>(count);
}

}  // namespace fastfs::cuda
