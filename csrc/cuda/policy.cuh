// The tuning of the CUDA kernels: every figure that was chosen for speed, one struct per architecture.
//
//   Order       decides the order of additions and so the bits of the results; the same for all architectures
//   Sm80, ...   decide nothing but speed; each architecture derives from the one before it and overrides what differs
//   PolicyHub   an Order and the architectures: the template argument of every kernel
//
// Device code uses Hub::Active, the policy of the architecture that it is compiled for. The host picks the same policy
// with Hub::visit and sizes the grid (and dynamic shared memory, if a ChunkReader needs it) by it. Block sizes belong
// to Order, so host and device agree on them.
//
// An architecture is a value of __CUDA_ARCH__, that is, of the PTX. The default build compiles one PTX, of compute_80,
// for all GPUs. A policy for another architecture takes effect once the build compiles PTX for it.
#pragma once

#include <type_traits>

#include "../layers.h"
#include "../sums.h"

namespace fastfs::cuda {

struct Any;           // load.cuh
struct ReadOnlyLoad;  // load.cuh
template <class Sums, class F, class L, class Order, class Policy>
class DirectLoads;  // segment_sums.cuh

// Changing a member changes the bits of stored results. A chunk and a chain are those of the CPU, whose results have
// the same error bound; only a tuning sweep has others (benchmarks/tuning). Further fixed parts of the order are
// kGroupChunks (layers.h) and the elements of a run (load.cuh).
struct Order {
  // segment_sums
  static constexpr int64_t kChunk = fastfs::kChunk;    // elements that one block sums
  static constexpr int64_t kWarpRow = fastfs::kChunk;  // longest row that one warp sums; at most kChunk
  static constexpr int kChain = fastfs::kChain;        // elements that a float accumulator takes: the error bound
  static constexpr int kThreads = 256;                 // of a block, here and in stream_read
  // gather_rows. Few rows are kept: small blocks spread them over more multiprocessors.
  static constexpr int kGatherThreads = 128;
  static constexpr int64_t kGatherWarpRow = 1024;  // longest row that one warp takes
  // stream_read adds nothing up; host and device have to agree on its chunks all the same.
  static constexpr int64_t kReadBytes = 65536;
};

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
    static constexpr int kWaves = 1;        // the grid has kWaves * kBlocksPerSm blocks per multiprocessor
    static constexpr int kChainsAhead = 1;  // chains whose loads are issued before the first addition
    using Load = ReadOnlyLoad;              // of 16 bytes
    // How a block reads a chunk.
    template <class Table, class Order>
    using ChunkReader = DirectLoads<Sums, F, L, Order, SegmentSums>;
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
  static_assert(Order::kWarpRow <= Order::kChunk, "a row of a warp is one chunk");
  static_assert(Order::kThreads % 32 == 0 && Order::kGatherThreads % 32 == 0, "a block consists of whole warps");

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
