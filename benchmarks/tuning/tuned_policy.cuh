// The policies of one variant: those of the library with the members that build.py defines as TUNE_* replaced.
// Included by policy.cuh in place of its own Policies.
#pragma once

#include "load_hints.cuh"

namespace fastfs::cuda {

struct TunedOrder : Order {
  static constexpr int kChunkBits = TUNE_CHUNK_BITS, kLargestChunkBits = TUNE_LARGEST_BITS;
  static constexpr int kGroupBits = TUNE_GROUP_BITS, kLaneElements = TUNE_LANE_ELEMENTS;
  static constexpr int kChain = TUNE_CHAIN, kThreads = TUNE_THREADS;
};

template <class Base>
struct Tuned : Base {
  template <class Sums, class F, class L>
  struct SegmentSums {
    static constexpr int kBlocksPerSm = TUNE_BLOCKS;
    using Load = TUNE_LOAD;
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
