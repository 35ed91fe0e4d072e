// The kernel behind feature_stats, update_stats and optimizer_stats: every sum of every layer in one pass, in one
// launch.
//
// Block mode (a segment is a layer, or a row of more than kWarpRow elements). A chunk is the work of one block of
// kThreads threads: 2^15 bytes of the first input, in wide segments up to 2^17; see chunk_bits() in policy.cuh. There
// is a block for every chunk, so the hardware starts the next one while others finish.
//
//   segment   |<---------------------------- width ---------------------------->|
//   chunk     |  0 (16384 elements)  |  1                   |  2           ...  |
//   tile      |  0  |  1  | ...  | 7 |    2048 elements = 256 threads x 8 (double: 1024 = 256 x 4)
//   thread    |0|1|2| ... |255|           8 consecutive elements: one 16-byte load of every input
//                                         for 16-bit dtypes, two for float (double: 4 elements, two loads)
//
// Row mode (per_row, rows of at most kWarpRow elements): a row is the work of a team of 8, 16 or 32 lanes, a tile has
// 8 elements for each of them, and a block takes several rows at once without a barrier. The fewer lanes share a row,
// the less of its time goes into adding them up. The sums of a row come straight out of the warp.
//
// The sums of a thread live in double. What enters them are chains: float sums over at most kChain elements (two tiles
// of a 16-bit dtype, whose loads are all under way before the first is used; one tile of float). With double inputs
// there are no chains. A chunk whose float sums left the range of float in a warp, or met NaN or Inf, is done again
// element by element in double, counting the non-finite entries; see needs_double().
//
// From the threads to the result, always in the order of the index (reduce.cuh):
//   thread -> warp (exchanges) -> block (shared memory) -> chunk, in memory -> group of 1024 chunks -> segment
//
// The order depends on the width of the segment alone: not on the grid, the layers beside it, alignment or strides.
#pragma once

#include "load.cuh"
#include "reduce.cuh"
#include "strided_load.cuh"

namespace fastfs::cuda {

// What a thread computes with.
template <class F>
struct compute {
  using type = float;
};
template <>
struct compute<F64> {
  using type = double;
};

// Tiles that one chain of additions takes; of Any, at most (see tiles() in strided_load.cuh).
template <class F, int kChain>
constexpr int kTiles = std::is_same_v<F, Any> || Storage<F>::kSize == 2 ? kChain / kRun<F> : 1;

// Values that the threads of a warp add up: the sums, the count of non-finite entries, and zeros up to a power of two.
constexpr int slots_of(int values) {
  int slots = 4;
  while (slots < values) slots *= 2;
  return slots;
}
template <class Sums>
constexpr int kSlots = slots_of(Sums::kSums + 1);

// The coefficients of an entry, from the table or from device memory.
template <class Sums, class V, class Table>
__device__ __forceinline__ Coefficients<V, Sums::kCoefficients> coefficients_of(const Table& table, int entry) {
  Coefficients<V, Sums::kCoefficients> c;
  if constexpr (Sums::kCoefficients > 0) {
    const double* const p = table.launch.coefficients;
#pragma unroll
    for (int i = 0; i < Sums::kCoefficients; ++i) {
      c.value[i] = static_cast<V>(p != nullptr ? __ldg(p + table.first_row(entry) * Sums::kCoefficients + i)
                                               : table.coefficient(entry, i));
    }
  }
  return c;
}

template <int N>
__device__ __forceinline__ void clear_sums(double (&sums)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) sums[k] = 0.0;
}

// One chain: the sums in V over kTiles runs. In double there is none, the terms go to the thread's sums themselves.
template <class Sums, class F, class L, int N>
struct Chain {
  using V = typename compute<F>::type;
  V sum[Sums::kSums];

  __device__ __forceinline__ explicit Chain(const double (&sums)[N]) {
#pragma unroll
    for (int k = 0; k < Sums::kSums; ++k) sum[k] = is_single<V>::value ? V(0) : static_cast<V>(sums[k]);
  }
  template <class Source>
  __device__ __forceinline__ void add(Run<Sums, F, L>& run, const Source& source,
                                      const Coefficients<V, Sums::kCoefficients>& c) {
    widen<L, kRun<F>>(source.any, run.last);
    visit_format<F, V>(source.first, [&](auto format) {
#pragma unroll
      for (int i = 0; i < kRun<F>; ++i) {
        V x[Sums::kInputs];
        run.values(i, x);
        Sums::template add_terms<decltype(format)>(sum, x, c);
      }
    });
  }
  __device__ __forceinline__ void flush(double (&sums)[N]) const {
#pragma unroll
    for (int k = 0; k < Sums::kSums; ++k) sums[k] = is_single<V>::value ? sums[k] + sum[k] : sum[k];
  }
};

// The sums of one thread, number `rank` of `team`, over its elements of a chunk: chains of kStep tiles, whose loads are
// all issued before the first addition.
template <class Sums, class F, class L, int kStep, class Source, class C, int N>
__device__ __forceinline__ void sum_chunk(const Source& source, const C& c, int rank, int team, double (&sums)[N]) {
  const int tile = team * kRun<F>;
  int at = rank * kRun<F>, begin = 0;
  if (source.wide()) {
#pragma unroll 1
    for (; begin + kStep * tile <= source.count; begin += kStep * tile, at += kStep * tile) {
      Run<Sums, F, L> run[kStep];
#pragma unroll
      for (int t = 0; t < kStep; ++t) source.load(at + t * tile, run[t]);
      Chain<Sums, F, L, N> chain(sums);
#pragma unroll
      for (int t = 0; t < kStep; ++t) chain.add(run[t], source, c);
      chain.flush(sums);
    }
  }
#pragma unroll 1
  while (begin < source.count) {
    Chain<Sums, F, L, N> chain(sums);
#pragma unroll 1
    for (int t = 0; t < source.tiles(kStep); ++t, begin += tile, at += tile) {
      Run<Sums, F, L> run;
      source.load_some(at, run);
      chain.add(run, source, c);
    }
    chain.flush(sums);
  }
}

// The same in double, one element after the other, with the count of non-finite entries.
template <class Sums, class F, class Source, class C, int N>
__device__ __forceinline__ void sum_chunk_double(const Source& source, const C& c, int rank, int team,
                                                 double (&sums)[N]) {
#pragma unroll 1
  for (int at = rank * kRun<F>; at < source.count; at += team * kRun<F>) {
#pragma unroll 1
    for (int i = at; i < at + kRun<F> && i < source.count; ++i) {
      double x[Sums::kInputs];
      source.elements(i, x);
      double terms[Sums::kSums];
#pragma unroll
      for (int k = 0; k < Sums::kSums; ++k) terms[k] = sums[k];
      visit_format<F, double>(source.first,
                              [&](auto format) { Sums::template add_terms<decltype(format)>(terms, x, c); });
#pragma unroll
      for (int k = 0; k < Sums::kSums; ++k) sums[k] = terms[k];
#pragma unroll
      for (int j = 0; j < Sums::kCounted; ++j) sums[Sums::kSums] += x[j] - x[j] == 0.0 ? 0.0 : 1.0;
    }
  }
}

// Hides from the compiler that a value is what it was: what is computed from it again is not kept in registers.
__device__ __forceinline__ int64_t forget(int64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(value));
#endif
  return value;
}

// Must what was summed (value k of the chunk, over one warp) be done again by sum_chunk_double?
template <class Sums, class V>
__device__ __forceinline__ bool must_repeat(int k, double sum) {
  if (is_single<V>::value) return k < Sums::kSums && needs_double<Sums>(k, sum);
  return !(sum - sum == 0.0);
}

// Row mode does not cut: no row has 2^kRowBits elements.
constexpr int kRowBits = 30;

// What value k of a chunk that was summed in V is multiplied with.
template <class Sums, class F, class V>
__device__ __forceinline__ double factor_of(DType first, int k) {
  if constexpr (!std::is_same_v<F, Any>) {
    return Sums::template factor<F, V>(k);
  } else {
    return first == DType::f16    ? Sums::template factor<F16, V>(k)
           : first == DType::bf16 ? Sums::template factor<BF16, V>(k)
                                  : Sums::template factor<F32, V>(k);
  }
}

template <class Sums, class F, class L, class Load, class Table>
using source_of =
    std::conditional_t<Table::kStrided, StridedSource<Sums, F, L, Load, Table>, DenseSource<Sums, F, L, Load>>;

// Sums: the measurement. F: dtype of all inputs but the last. L: dtype of the last, or Any. Hub: the tuning.
template <class Sums, class F, class L, class Table, class Hub>
__global__ void __launch_bounds__(Hub::Order::kThreads, Hub::Active::template SegmentSums<Sums, F, L>::kBlocksPerSm)
    segment_sums(const __grid_constant__ Table table) {
  using V = typename compute<F>::type;
  using Order = typename Hub::Order;
  using Policy = typename Hub::Active::template SegmentSums<Sums, F, L>;
  constexpr int N = kSlots<Sums>, kThreads = Order::kThreads, kWarps = kThreads / 32, kValues = Sums::kSums + 1;
  constexpr bool kRows = Sums::kCoefficients == 0;  // parameters are not measured row by row
  // The warp holds one value per lane at the end, and one lane more writes the count of elements.
  static_assert(kValues < 32,
                "a measurement has at most 30 sums: split it in two, or let write_row() in "
                "reduce.cuh write a row in several steps");
  static_assert(N <= Order::kSmallestTeam || !kRows, "a team has a lane for every value");
  __shared__ double parts[kWarps][N];
  __shared__ int is_last;
  const Launch& launch = table.launch;
  const int team = kRows ? launch.team : kThreads, teams = kThreads / team, lanes = team < 32 ? team : 32;
  const bool row_mode = team < kThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = threadIdx.x % team;
  const int place = lane % lanes;                     // within the team, or the warp
  const int share = lanes / N, held = place / share;  // a value is in `share` lanes, value `held` in this one
  // A chunk of float with a last input of double is done in double at once.
  const bool skip = std::is_same_v<L, Any> && is_single<V>::value && launch.last == DType::f64;
  int64_t number = static_cast<int64_t>(blockIdx.x) * (kRows ? launch.rounds * teams : 1) + threadIdx.x / team;
  int entry = 0;
#pragma unroll 1
  for (int round = kRows ? launch.rounds : 1; round > 0; --round, number += teams) {
    // A team without a row goes along, since the others of its warp exchange values with it.
    const bool idle = number >= launch.items;
    entry = entry_of(table, idle ? launch.items - 1 : number, entry);
    const auto item = [&](int64_t i) {
      return item_at(table, idle ? launch.items - 1 : i, entry,
                     row_mode ? kRowBits : chunk_bits<Order>(size_of<F>(launch.first), table.width(entry)));
    };
    Item at = item(number);
    if (idle) at.count = 0;
    const source_of<Sums, F, L, typename Policy::Load, Table> source(table, at);
    double sums[N];
    clear_sums(sums);
    if (!skip) {
      sum_chunk<Sums, F, L, kTiles<F, Order::kChain>>(source, coefficients_of<Sums, V>(table, entry), rank, team, sums);
    }
    double value = team_sums(sums, lane, lanes);
    bool again = skip || must_repeat<Sums, V>(held, value);
    bool any = again;  // in the block, or in the warp
    if (row_mode) {
      const unsigned voters = __ballot_sync(kFullWarp, again);
      again = (voters >> (lane - place) & kFullWarp >> (32 - lanes)) != 0;
      any = voters != 0;
    } else {
      if (place % share == 0) parts[warp][held] = value;
      any = again = __syncthreads_or(again);
    }
    if (any) {
      clear_sums(sums);
      sum_chunk_double<Sums, F>(source, coefficients_of<Sums, double>(table, entry), rank, team, sums);
      const double repeated = team_sums(sums, lane, lanes);
      value = again ? repeated : value;
      if (!row_mode) {
        if (place % share == 0) parts[warp][held] = value;
        __syncthreads();
      }
    }
    // From here on lane l of a team, or of warp 0, holds value l % N.
    const int k = place % N;
    if (row_mode) {
      value = __shfl_sync(kFullWarp, value, lane - place + k * share);
    } else {
      value = warp == 0 ? sum_warps(parts, lane) : 0.0;
    }
    if (k < Sums::kSums) {
      value *= again ? factor_of<Sums, F, double>(launch.first, k) : factor_of<Sums, F, V>(launch.first, k);
    }
    const Item done = item(forget(number));
    if (!row_mode && done.chunks > 1) {
      if (!finish<Order::kGroupBits>(launch, number, done, value, parts, is_last)) return;
    }
    if (idle || (!row_mode && warp > 0)) continue;
    double* const row = launch.out + (table.first_row(entry) + done.segment) * (Sums::kSums + 2);
    write_row<kValues>(row, value, table.width(entry), place, lanes);
  }
}

}  // namespace fastfs::cuda
