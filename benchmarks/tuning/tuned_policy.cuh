// The policies of one variant: those of the library with the members that build.py defines as TUNE_* replaced.
// Included by policy.cuh in place of its own Policies.
#pragma once

#include "load_hints.cuh"
#if defined(TUNE_SPACING_BY_MAX)
#include "../feature_sums.h"
#include "spacing_by_max.cuh"
#endif

namespace fastfs::cuda {

template <class Sums, class F, class L, class Table, class Order, class Policy, int kStages>
class BulkCopies;  // bulk_copy.cuh

struct TunedOrder : Order {
  static constexpr int64_t kChunk = TUNE_CHUNK, kWarpRow = TUNE_CHUNK;
  static constexpr int kChain = TUNE_CHAIN, kThreads = TUNE_THREADS;
};

template <class Base>
struct Tuned : Base {
  template <class Sums, class F, class L>
  struct SegmentSums {
    static constexpr int kBlocksPerSm = TUNE_BLOCKS, kWaves = TUNE_WAVES, kChainsAhead = TUNE_CHAINS_AHEAD;
    using Load = TUNE_LOAD;
    template <class Table, class Order>
#if TUNE_STAGES > 0
    using ChunkReader = BulkCopies<Sums, F, L, Table, Order, SegmentSums, TUNE_STAGES>;
#else
    using ChunkReader = DirectLoads<Sums, F, L, Order, SegmentSums>;
#endif
  };
};

template <class List>
struct tuned_list;
template <class... Bases>
struct tuned_list<PolicyList<Bases...>> {
  using type = PolicyList<Tuned<Bases>...>;
};
struct Policies : PolicyHub<TunedOrder, tuned_list<Architectures>::type> {};

}  // namespace fastfs::cuda
