// From layers to launches: groups the layers that can share a launch, and selects the kernel.
#pragma once

#include <memory>
#include <stdexcept>
#include <vector>

#include "runtime.h"
#include "segment_sums.cuh"

namespace fastfs::cuda {

// What the layers of one launch have in common.
struct Kind {
  DType first, last;
  bool strided;
  int team;  // threads that sum an item: a row by 8, 16 or 32 lanes, a chunk by a block

  static constexpr int kKinds = 128;
  int index() const {
    const int code = team == 8 ? 0 : team == 16 ? 1 : team == 32 ? 2 : 3;
    return static_cast<int>(first) << 5 | static_cast<int>(last) << 3 | static_cast<int>(strided) << 2 | code;
  }
  static Kind at(int i) {
    const int code = i & 3;
    return Kind{static_cast<DType>(i >> 5), static_cast<DType>(i >> 3 & 3), (i >> 2 & 1) != 0,
                code == 3 ? Policies::Order::kThreads : 8 << code};
  }
};

// Short rows are summed by a part of a warp each. A single short segment is summed by a block, which is faster.
inline Kind kind_of(const Layer& layer, int inputs) {
  bool strided = false;
  for (int j = 0; j < inputs; ++j) strided = strided || !layer.contiguous[j];
  using Order = Policies::Order;
  const bool rows = layer.segments > 1 && layer.width <= Order::kWarpRow;
  return Kind{layer.first, layer.last, strided && layer.width > 0,
              rows ? row_team<Order>(layer.width) : Order::kThreads};
}

// Chunks of a segment of a layer that blocks sum.
inline int64_t chunks_of_segment(const Layer& layer) {
  return chunks_in(layer.width, chunk_bits<Policies::Order>(item_size(layer.first), layer.width));
}

struct Job {
  const std::vector<Layer>& layers;
  const std::vector<uint8_t>& kinds;  // Kind::index() of every layer
  const double* coefficients;         // in device memory, or null
  double* out;
  double* partials;
  uint32_t* tickets;
  bool large_parameters;
  void* stream;
};

// Rows that a team takes one after the other, where the rows of a launch have `elements` elements. Blocks of short rows
// get as many as a chunk has elements, if there are then blocks enough to fill a GPU.
template <class Order>
int rounds_of(const Launch& launch, int64_t elements, int64_t item_size) {
  const int64_t rows = Order::kThreads / launch.team, all = ceil_div(launch.items, rows);
  const int64_t of_round = max64(elements / max64(all, 1), 1);  // elements of a block in a round
  return static_cast<int>(max64(min64((int64_t{1} << Order::kChunkBits) / item_size / of_round, all / kRowBlocks), 1));
}

// Launches the layers of one kind, as many in a table as it holds.
template <class Sums, class F, class L, class Table, class Hub = Policies>
void submit_tables(const Job& job, Kind kind) {
  using Order = typename Hub::Order;
  const std::unique_ptr<Table> table(new Table);  // not zeroed: add() writes what the kernel reads
  Launch& launch = table->launch;
  launch = Launch{};
  launch.out = job.out;
  launch.partials = job.partials;
  launch.tickets = job.tickets;
  launch.coefficients = job.coefficients;
  launch.first = kind.first;
  launch.last = kind.last;
  launch.team = kind.team;
  const bool row_mode = kind.team < Order::kThreads;
  int64_t elements = 0;
  const auto flush = [&] {
    if (launch.items > 0) {
      launch.rounds = row_mode ? rounds_of<Order>(launch, elements, item_size(kind.first)) : 1;
      const int64_t of_block = int64_t{Order::kThreads / kind.team} * launch.rounds;
      const Grid grid{static_cast<int>(ceil_div(launch.items, of_block)), Order::kThreads};
      start(segment_sums<Sums, F, L, Table, Hub>, *table, grid, job.stream);
    }
    launch.items = elements = 0;
    table->clear();
  };
  int64_t row = 0;
  for (size_t i = 0; i < job.layers.size(); ++i) {
    const Layer& layer = job.layers[i];
    if (job.kinds[i] == kind.index() && layer.segments > 0) {
      if (!table->add(layer, launch.items, row)) {
        flush();
        table->add(layer, 0, row);
      }
      launch.items += row_mode ? layer.segments : layer.segments * chunks_of_segment(layer);
      elements += layer.segments * layer.width;
    }
    row += layer.segments;
  }
  flush();
}

// Whether a measurement has kernels for first inputs of dtype F, or of any dtype.
template <class Sums, class F>
constexpr bool kTakes = Sums::kSixteenBit || Storage<F>::kSize > 2;

// The kernels of a measurement. There are as few as speed allows, since they make up most of the build:
//   F16, BF16, F32   contiguous layers: with small and large tables where all inputs are F, and with small ones for any
//                    last dtype
//   Any              layers of any strides, whose first inputs are not double
//   F64              first inputs of double, whatever the strides and the last dtype
template <class Sums, class F>
void submit_taken(const Job& job, Kind kind) {
  using Small = DenseTable<Sums::kInputs, kSmallTable, Sums::kCoefficients>;
  using Large = DenseTable<Sums::kInputs, kLargeTable, Sums::kCoefficients>;
  using Strided = StridedTable<Sums::kInputs, kSmallTable, Sums::kCoefficients>;
  if constexpr (std::is_same_v<F, Any>) {
    using First = std::conditional_t<Sums::kSixteenBit, Any, F32>;
    submit_tables<Sums, First, First, Strided>(job, kind);
  } else if constexpr (std::is_same_v<F, F64>) {
    submit_tables<Sums, F64, std::conditional_t<Sums::kOneDtype, F64, AnyDouble>, Strided>(job, kind);
  } else {
    if constexpr (!Sums::kOneDtype) {
      if (kind.first != kind.last) return submit_tables<Sums, F, Any, Small>(job, kind);
    }
#if defined(FASTFS_CUDA_ON_CPU) || CUDART_VERSION >= 12010
    if (job.large_parameters) {
      int count = 0;
      for (const uint8_t k : job.kinds) count += k == kind.index();
      if (count > Small::kCapacity) return submit_tables<Sums, F, F, Large>(job, kind);
    }
#endif
    submit_tables<Sums, F, F, Small>(job, kind);
  }
}
// Launches the layers of one kind, by the kernels of F.
template <class Sums, class F>
void submit(const Job& job, Kind kind) {
  if constexpr (kTakes<Sums, F>) {
    submit_taken<Sums, F>(job, kind);
  } else {
    throw std::invalid_argument("fastfs: this measurement has no kernels for this dtype");
  }
}

}  // namespace fastfs::cuda
