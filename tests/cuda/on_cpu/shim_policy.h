// The policies of csrc/cuda/policy.cuh with smaller blocks, for the sanitizers.
#pragma once

namespace fastfs::cuda {

struct SmallBlocks : Order {
  static constexpr int kThreads = 64, kGatherThreads = 64;
};
struct Policies : PolicyHub<SmallBlocks> {};

}  // namespace fastfs::cuda
