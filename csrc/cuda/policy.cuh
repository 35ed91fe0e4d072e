// The tuning of the CUDA kernels: every figure that was chosen for speed, one struct per architecture.
//
//   Order       decides the order of additions and so the bits of the results; the same for all architectures
//   Sm80, ...   decide nothing but speed; each architecture derives from the one before it and overrides what differs
//   PolicyHub   an Order and the architectures: the template argument of every kernel
//
// Device code uses Hub::Active, the policy of the architecture that it is compiled for; the host picks the same policy
// with Hub::visit where the grid depends on it. The cut into chunks and block sizes belong to Order, so host and device
// agree on them.
//
// An architecture is a value of __CUDA_ARCH__, that is, of the PTX. The default build compiles one PTX, of compute_80,
// for all GPUs. A policy for another architecture takes effect once the build compiles PTX for it.
#pragma once

#include <type_traits>

#include "../layers.h"
#include "../sums.h"

namespace fastfs::cuda {

struct Any;            // load.cuh
struct ReadOnlyLoad;   // load.cuh
struct StreamingLoad;  // load.cuh

// Changing a member changes the bits of stored results. The chain is that of the CPU, whose results have the same error
// bound. A further fixed part of the order is the elements of a run (load.cuh).
struct Order {
  // segment_sums. A chunk has 2^kChunkBits to 2^kLargestChunkBits bytes of an input of the first dtype: see
  // chunk_bits(). A block adds the partial sums of up to 2^kGroupBits chunks at a time.
  static constexpr int kChunkBits = 15, kLargestChunkBits = 17, kGroupBits = 10;
  static constexpr int64_t kWarpRow = 8192;      // longest row that is summed by one warp or a part of it
  static constexpr int kLaneElements = 64;       // elements that a lane should have before another lane shares the row
  static constexpr int kSmallestTeam = 8;        // lanes of a row, at least
  static constexpr int kChain = fastfs::kChain;  // elements that a float accumulator takes: the error bound
  static constexpr int kThreads = 256;           // of a block, here and in stream_read
  // gather_rows. Few rows are kept: small blocks spread them over more multiprocessors.
  static constexpr int kGatherThreads = 128;
  static constexpr int64_t kGatherWarpRow = 1024;  // longest row that one warp takes
  // stream_read adds nothing up; host and device have to agree on its chunks all the same.
  static constexpr int kReadBits = 16;  // bytes of a chunk, as a power of two
};

// Row mode: a block takes several rounds of short rows only where there are still so many blocks, which keep any GPU
// busy. Decides nothing but speed.
constexpr int64_t kRowBlocks = 1024;

// Elements of a chunk, as a power of two, where the first input has elements of `item_size` bytes. What fits into the
// largest chunk is one, without partial sums. Otherwise small chunks spread a layer over the GPU; in a wide layer there
// are enough chunks, and larger ones mean fewer partial sums, up to what one block adds at a time. This is the only
// place that decides on the cut, for host and device.
template <class Order>
FASTFS_HD constexpr int chunk_bits(int64_t item_size, int64_t width) {
  const int item_bits = item_size == 8 ? 3 : item_size == 4 ? 2 : 1;
  const int largest = Order::kLargestChunkBits - item_bits;
  if (width <= int64_t{1} << largest) return largest;
  int bits = Order::kChunkBits - item_bits;
  while (bits < largest && width > int64_t{1} << (bits + Order::kGroupBits)) ++bits;
  return bits;
}

// Lanes of a warp that sum one row together.
template <class Order>
constexpr int row_team(int64_t width) {
  int team = Order::kSmallestTeam;
  while (team < 32 && width > int64_t{Order::kLaneElements} * team) team *= 2;
  return team;
}

// Ampere, Ada and Hopper.
struct Sm80 {
  static constexpr int kArchitecture = 800;  // the lowest __CUDA_ARCH__ that this policy serves

  // F: dtype of all inputs but the last; L: dtype of the last, or Any.
  template <class Sums, class F, class L>
  struct SegmentSums {
    // Resident blocks that the registers have to allow. Two for inputs in double and of unknown dtype, three otherwise;
    // the rules of optimizer_stats need more registers.
    static constexpr int kBlocksPerSm =
        (std::is_same_v<F, F64> || std::is_same_v<L, Any> ? 2 : 3) - (Sums::kCoefficients > 0 ? 1 : 0);
    // Of 16 bytes. Every byte is used once: it is the first to leave the caches.
    using Load = StreamingLoad;
  };

  template <class F>
  struct GatherRows {
    // float has more bytes in flight in each thread and needs more registers.
    static constexpr int kBlocksPerSm = std::is_same_v<F, F32> ? 5 : 6;
    using Load = ReadOnlyLoad;
  };
  struct MergeRows {
    static constexpr int kBlocksPerSm = 8;
  };

  struct StreamRead {
    static constexpr int kBlocksPerSm = 4;
    static constexpr int kLoadsAhead = 8;  // of 16 bytes
  };
};

// Blackwell: B200 and RTX 50, which share one PTX. The figures are those of Sm80, since static analysis favours no
// others that keep the bits (docs/kernels.md). For bf16 on B200, two blocks per multiprocessor need 24.5 instructions
// per element instead of 25.3 but have 48 KB in flight instead of 72; four blocks need 25.8 and have 48 KB in flight.
struct Sm100 : Sm80 {
  static constexpr int kArchitecture = 1000;
};

// All architectures, oldest first.
template <class... Policies>
struct PolicyList {};
using Architectures = PolicyList<Sm80, Sm100>;

// What this pass of the compiler generates code for; 0 on the host.
#if defined(__CUDA_ARCH__)
constexpr int kTargetArchitecture = __CUDA_ARCH__;
#else
constexpr int kTargetArchitecture = 0;
#endif

// The newest policy that is not newer than an architecture; the oldest one if all are newer.
template <int kArchitecture, class Policy, class... Newer>
struct select_policy {
  using type = Policy;
};
template <int kArchitecture, class Policy, class Next, class... Newer>
struct select_policy<kArchitecture, Policy, Next, Newer...> {
  static_assert(Policy::kArchitecture < Next::kArchitecture, "policies are listed oldest first");
  using newer = typename select_policy<kArchitecture, Next, Newer...>::type;
  using type = std::conditional_t<(Next::kArchitecture <= kArchitecture), newer, Policy>;
};

template <class SumOrder, class List = Architectures>
struct PolicyHub;
template <class SumOrder, class... Policies>
struct PolicyHub<SumOrder, PolicyList<Policies...>> {
  using Order = SumOrder;
  using Active = typename select_policy<kTargetArchitecture, Policies...>::type;
  static_assert(Order::kThreads % 32 == 0 && Order::kGatherThreads % 32 == 0, "a block consists of whole warps");
  static_assert((Order::kThreads & (Order::kThreads - 1)) == 0, "partial sums are shared out by powers of two");
  static_assert(Order::kGroupBits >= 1, "the ticket of a segment lies behind that of its first group");

  // Returns call(policy) with the policy of an architecture that is known at run time.
  template <class Call>
  static auto visit(int architecture, Call call) {
    return visit_from<Call, Policies...>(architecture, call);
  }

 private:
  template <class Call, class Policy>
  static auto visit_from(int, Call call) {
    return call(Policy{});
  }
  template <class Call, class Policy, class Next, class... Newer>
  static auto visit_from(int architecture, Call call) {
    return architecture < Next::kArchitecture ? call(Policy{}) : visit_from<Call, Next, Newer...>(architecture, call);
  }
};

}  // namespace fastfs::cuda

// The policies that the launchers use: those of the library, or those of a header that the tuning sweep
// (benchmarks/tuning) or the sanitizers on the CPU (tests/cuda/on_cpu) bring along.
#if defined(FASTFS_POLICIES)
#include FASTFS_POLICIES
#else
namespace fastfs::cuda {
struct Policies : PolicyHub<Order> {};  // a struct, for short symbols
}  // namespace fastfs::cuda
#endif
