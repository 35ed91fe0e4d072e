// The policies of csrc/cuda/policy.cuh with small blocks, chunks and groups: for the sanitizers, and so that few
// elements have several levels of groups and all widths of chunks.
#pragma once

namespace fastfs::cuda {

struct SmallOrder : Order {
  static constexpr int kThreads = 64, kGatherThreads = 64;
  static constexpr int kChunkBits = 11, kLargestChunkBits = 13, kGroupBits = 2;
};
struct Policies : PolicyHub<SmallOrder> {};

}  // namespace fastfs::cuda
