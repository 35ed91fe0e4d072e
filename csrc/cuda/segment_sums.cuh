// The kernel behind feature_stats, update_stats and optimizer_stats: every sum of every layer in one pass, in one
// launch.
//
// Block mode (a segment is a layer, or a row of more than kChunk elements). A chunk of kChunk elements is the work of
// one block of kThreads threads; blocks take items blockIdx.x, blockIdx.x + gridDim.x, ...
//
//   segment   |<---------------------------- width ---------------------------->|
//   chunk     |  0 (8192 elements)   |  1                   |  2           ...  |
//   tile      |  0  |  1  |  2  |  3 |    2048 elements = 256 threads x 8 (double: 1024 = 256 x 4)
//   thread    |0|1|2| ... |255|           8 consecutive elements: one 16-byte load of every input
//                                         for 16-bit dtypes, two for float (double: 4 elements, two loads)
//
// Row mode (per_row, rows of at most kChunk elements): a row is the work of one warp, a tile 32 x 8 elements, and a
// block takes kWarps rows at once without a barrier. Rows are many and short, so there is parallelism without cutting
// them, and the sums of a row come straight out of the warp.
//
// The sums of a thread live in double. What enters them are chains: float sums over at most kChain elements (two tiles
// of a 16-bit dtype, whose loads are all under way before the first is used; one tile of float). With double inputs
// there are no chains. A chunk whose float sums left the range of float in a warp, or met NaN or Inf, is done again
// element by element in double, counting the non-finite entries; see needs_double().
//
// From the threads to the result, always in the order of the index (reduce.cuh):
//   thread -> warp (exchanges) -> block (shared memory) -> chunk, in memory -> group of 64 chunks -> segment
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

// The sums of one thread, number `rank` of `team`, over its elements of a chunk: chains of kStep tiles, of which the
// loads of kAhead are issued before the first addition.
template <class Sums, class F, class L, int kStep, int kAhead, class Source, class C, int N>
__device__ __forceinline__ void sum_chunk(const Source& source, const C& c, int rank, int team, double (&sums)[N]) {
  constexpr int kLoads = kAhead * kStep;
  const int tile = team * kRun<F>;
  int at = rank * kRun<F>, begin = 0;
  if (source.wide()) {
#pragma unroll 1
    for (; begin + kLoads * tile <= source.count; begin += kLoads * tile, at += kLoads * tile) {
      Run<Sums, F, L> run[kLoads];
#pragma unroll
      for (int t = 0; t < kLoads; ++t) source.load(at + t * tile, run[t]);
#pragma unroll
      for (int first = 0; first < kLoads; first += kStep) {
        Chain<Sums, F, L, N> chain(sums);
#pragma unroll
        for (int t = first; t < first + kStep; ++t) chain.add(run[t], source, c);
        chain.flush(sums);
      }
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

// The ChunkReader of the default policies: every thread loads its elements straight from global memory.
template <class Sums, class F, class L, class Order, class Policy>
class DirectLoads {
 public:
  static constexpr int kSharedBytes = 0;  // dynamic shared memory of a block

  // `number`: the first item of the block, which takes every `step`-th one.
  template <class Table>
  __device__ __forceinline__ DirectLoads(const Table&, bool /*block_mode*/, int64_t /*number*/, int64_t /*step*/) {}

  // Called for the items of the block in turn.
  template <class Source, class C, int N>
  __device__ __forceinline__ void sum_chunk(const Source& source, const C& c, int rank, int team, double (&sums)[N]) {
    cuda::sum_chunk<Sums, F, L, kTiles<F, Order::kChain>, Policy::kChainsAhead>(source, c, rank, team, sums);
  }
};

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
  using Policy = typename Hub::Active::template SegmentSums<Sums, F, L>;
  constexpr int64_t kChunk = Hub::Order::kChunk;
  constexpr int N = kSlots<Sums>, kThreads = Hub::Order::kThreads, kWarps = kThreads / 32;
  // The warp holds one value per lane at the end, and one lane more writes the count of elements.
  static_assert(Sums::kSums + 2 <= 32,
                "a measurement has at most 30 sums: split it in two, or let finish() in "
                "reduce.cuh write a row in several steps");
  __shared__ double parts[2][kWarps][N];  // two, so that one barrier a chunk does: a slow warp 0 still reads the other
  const Launch& launch = table.launch;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool row_mode = launch.row_mode;
  const int rank = row_mode ? lane : threadIdx.x, team = row_mode ? 32 : kThreads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (row_mode ? kWarps : 1);
  int64_t number = static_cast<int64_t>(blockIdx.x) * (row_mode ? kWarps : 1) + (row_mode ? warp : 0);
  // A chunk of float with a last input of double is done in double at once.
  const bool skip = std::is_same_v<L, Any> && is_single<V>::value && launch.last == DType::f64;
  int entry = 0, side = 0;
  typename Policy::template ChunkReader<Table, typename Hub::Order> reader(table, !row_mode, number, step);
#pragma unroll 1
  for (; number < launch.items; number += step) {
    const Item item = locate<kChunk>(table, number, entry);
    entry = item.entry;
    const source_of<Sums, F, L, typename Policy::Load, Table> source(table, item);
    double sums[N];
    clear_sums(sums);
    if (!skip) reader.sum_chunk(source, coefficients_of<Sums, V>(table, entry), rank, team, sums);
    double value = warp_sums(sums, lane);  // of value lane / (32 / N)
    int again = skip || must_repeat<Sums, V>(lane / (32 / N), value);
    if (row_mode) {
      again = __any_sync(kFullWarp, again);
    } else {
      if (lane % (32 / N) == 0) parts[side][warp][lane / (32 / N)] = value;
      again = __syncthreads_or(again);
    }
    if (again) {
      clear_sums(sums);
      sum_chunk_double<Sums, F>(source, coefficients_of<Sums, double>(table, entry), rank, team, sums);
      value = warp_sums(sums, lane);
      if (!row_mode) {
        if (lane % (32 / N) == 0) parts[side][warp][lane / (32 / N)] = value;
        __syncthreads();
      }
    }
    if (row_mode || warp == 0) {
      // From here on lane l holds value l % N.
      const int k = lane % N;
      if (row_mode) {
        value = __shfl_sync(kFullWarp, value, k * (32 / N));
      } else {
        value = 0.0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) value += parts[side][w][k];
      }
      if (k < Sums::kSums) {
        value *= again ? factor_of<Sums, F, double>(launch.first, k) : factor_of<Sums, F, V>(launch.first, k);
      }
      const Item done = locate<kChunk>(table, forget(number), entry);
      double* row = launch.out + (table.first_row(entry) + done.segment) * (Sums::kSums + 2);
      finish<N, Sums::kSums + 1>(launch, number, done, table.width(entry), row, value, lane);
    }
    side ^= 1;
  }
}

}  // namespace fastfs::cuda
