// The chunks of block mode by way of shared memory: asynchronous bulk copies, several stages ahead.
//
//   items of the block   | chunk 5             | chunk 137           | chunk 269 ...
//   pieces               |  0      |  1        |  2      |  3        |  4             one chain of every thread each
//   stages (three)          s0        s1          s2        s0          s1
//                           in use    in flight   in flight
//
// A piece is what all threads of a block add up in one chain. Thread 0 walks the items of its block ahead of the
// others and keeps the free stages filled, also across chunks. Every thread takes the same elements in the same order
// as in sum_chunk, so the bits are the same. What is no whole piece, and chunks that are not aligned, go through
// sum_chunk itself; so do short rows (a warp each), layers of several dtypes, double and strided layers. It takes the
// place of DirectLoads as the ChunkReader of a policy.
#pragma once

#include "bulk_primitives.cuh"
#include "segment_sums.cuh"

namespace fastfs::cuda {

template <class Sums, class F, class L, class Table, class Order, class Policy, int kStages>
class BulkCopies {
 public:
  static constexpr bool kUsed = !Table::kStrided && std::is_same_v<F, L> && !std::is_same_v<F, F64>;
  static constexpr int kInputs = Sums::kInputs, kThreads = Order::kThreads, kWarps = kThreads / 32;
  static constexpr int kChains = kTiles<F, Order::kChain>;
  static constexpr int kTile = kThreads * kRun<F>, kPiece = kChains * kTile;        // elements
  static constexpr int kInputBytes = kPiece * Storage<F>::kSize;                    // of a piece
  static constexpr int kSharedBytes = kUsed ? kStages * kInputs * kInputBytes : 0;  // of all stages
  using Source = DenseSource<Sums, F, L, typename Policy::Load>;
  static_assert(kStages >= 2, "one stage in use, one in flight");

  // Called by all threads of the block; `number` is its first item, `step` takes it to the next.
  __device__ __forceinline__ BulkCopies(const Table& table, bool block_mode, int64_t number, int64_t step)
      : table_(table), step_(step), active_(kUsed && block_mode) {
    if constexpr (kUsed) {
      if (!active_) return;
      if (threadIdx.x == 0) {
#pragma unroll 1
        for (int s = 0; s < kStages; ++s) {
          barrier_init(&shared().full[s], 1);
          barrier_init(&shared().empty[s], kWarps);
        }
        barrier_init_done();
        Ahead& ahead = shared().ahead;
        ahead.number = number - step;
        ahead.entry = ahead.at = ahead.count = ahead.stage = 0;
        ahead.parity = 1;
        ahead.wanted = kStages - 1;
      }
      __syncthreads();
    }
  }

  // As the function sum_chunk, for the items of the block in turn.
  template <class AnySource, class C, int N>
  __device__ __forceinline__ void sum_chunk(const AnySource& source, const C& c, int rank, int team,
                                            double (&sums)[N]) {
    AnySource rest = source;
    if constexpr (kUsed) {
#pragma unroll 1
      for (int pieces = active_ && source.wide() ? source.count / kPiece : 0; pieces > 0; --pieces) {
        if (threadIdx.x == 0) fill();
        __syncwarp();
        barrier_wait(&shared().full[stage_], parity_);
        Run<Sums, F, L> run[kChains];
        load(rank, run);
        Chain<Sums, F, L, N> chain(sums);
#pragma unroll
        for (int t = 0; t < kChains; ++t) chain.add(run[t], source.any, c);
        chain.flush(sums);
        __syncwarp();
        if (rank % 32 == 0) barrier_arrive(&shared().empty[stage_]);
        next(stage_, parity_);
#pragma unroll
        for (int j = 0; j < kInputs; ++j) rest.p[j] += kInputBytes;
        rest.count -= kPiece;
      }
    }
    cuda::sum_chunk<Sums, F, L, kChains, Policy::kChainsAhead>(rest, c, rank, team, sums);
  }

 private:
  // Where thread 0 is, ahead of the others: at element `at` of item `number`, of which `count` come in pieces;
  // `wanted` pieces are to be started.
  struct Ahead {
    int64_t number;
    const char* p[kInputs];
    int entry, at, count, stage, wanted;
    uint32_t parity;
  };
  struct Shared {
    uint64_t full[kStages], empty[kStages];
    Ahead ahead;
  };
  __device__ __forceinline__ static Shared& shared() {
    __shared__ Shared one;
    return one;
  }
  __device__ __forceinline__ static char* stage(int s) { return dynamic_shared() + s * kInputs * kInputBytes; }
  __device__ __forceinline__ static void next(int& stage, uint32_t& parity) {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }

  // By thread 0: starts the copies of one more piece, and at first of all that there is room for. A stage is filled
  // when all warps have left it: the one in use a piece ago, so that warp 0 seldom waits for the others.
  __device__ __forceinline__ void fill() {
    Ahead& ahead = shared().ahead;
    ++ahead.wanted;
#pragma unroll 1
    while (ahead.wanted > 0) {
#pragma unroll 1
      while (ahead.at + kPiece > ahead.count) {
        if (ahead.number + step_ >= table_.launch.items) return;
        ahead.number += step_;
        const Item item = locate<Order::kChunk>(table_, ahead.number, ahead.entry);
        const Source source(table_, item);
#pragma unroll
        for (int j = 0; j < kInputs; ++j) ahead.p[j] = source.p[j];
        ahead.entry = item.entry;
        ahead.at = 0;
        ahead.count = source.wide() ? item.count : 0;
      }
      const int s = ahead.stage;
      barrier_wait(&shared().empty[s], ahead.parity);
      barrier_expect(&shared().full[s], kInputs * kInputBytes);
#pragma unroll 1
      for (int j = 0; j < kInputs; ++j) {
        bulk_load(stage(s) + j * kInputBytes, ahead.p[j], kInputBytes, &shared().full[s]);
        ahead.p[j] += kInputBytes;
      }
      ahead.at += kPiece;
      --ahead.wanted;
      next(ahead.stage, ahead.parity);
    }
  }

  // The runs of one thread, from the stage in use.
  __device__ __forceinline__ void load(int rank, Run<Sums, F, L> (&run)[kChains]) const {
#pragma unroll
    for (int t = 0; t < kChains; ++t) {
      const char* p = stage(stage_) + (t * kTile + rank * kRun<F>)*Storage<F>::kSize;
#pragma unroll
      for (int j = 0; j < kInputs; ++j) {
        words(p + j * kInputBytes, j == kInputs - 1 ? run[t].last : run[t].first[j]);
      }
    }
  }
  __device__ __forceinline__ static void words(const char* p, uint32_t (&w)[kWordsOf<F, kRun<F>>]) {
#pragma unroll
    for (int i = 0; i < kWordsOf<F, kRun<F>> / 4; ++i) {
      const uint4 q = reinterpret_cast<const uint4*>(p)[i];
      w[4 * i] = q.x, w[4 * i + 1] = q.y, w[4 * i + 2] = q.z, w[4 * i + 3] = q.w;
    }
  }

  const Table& table_;
  int64_t step_;
  bool active_;
  int stage_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace fastfs::cuda
