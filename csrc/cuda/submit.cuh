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
  bool strided, row_mode;

  static constexpr int kKinds = 64;
  int index() const {
    return static_cast<int>(first) << 4 | static_cast<int>(last) << 2 | static_cast<int>(strided) << 1 |
           static_cast<int>(row_mode);
  }
  static Kind at(int i) {
    return Kind{static_cast<DType>(i >> 4), static_cast<DType>(i >> 2 & 3), (i >> 1 & 1) != 0, (i & 1) != 0};
  }
};

// Rows of at most `warp_row` elements are summed by a warp each. A single short segment is summed by a block, which is
// faster.
inline Kind kind_of(const Layer& layer, int inputs, int64_t warp_row) {
  bool strided = false;
  for (int j = 0; j < inputs; ++j) strided = strided || !layer.contiguous[j];
  return Kind{layer.first, layer.last, strided && layer.width > 0, layer.segments > 1 && layer.width <= warp_row};
}

struct Job {
  const std::vector<Layer>& layers;
  const std::vector<uint8_t>& kinds;  // Kind::index() of every layer
  const double* coefficients;         // in device memory, or null
  double* out;
  double* partials;
  uint32_t* tickets;
  int multiprocessors;
  int architecture;  // of the kernels, as a value of __CUDA_ARCH__
  bool large_parameters;
  void* stream;
};

// The grid of a launch under one policy: as many blocks as are resident at a time, times the waves.
template <class Sums, class F, class L, class Table, class Hub>
Grid grid_of(const Job& job, const Launch& launch) {
  constexpr int kThreads = Hub::Order::kThreads;
  return Hub::visit(job.architecture, [&](auto architecture) {
    using Policy = typename decltype(architecture)::template SegmentSums<Sums, F, L>;
    using Reader = typename Policy::template ChunkReader<Table, typename Hub::Order>;
    const int64_t wanted = launch.row_mode ? ceil_div(launch.items, kThreads / 32) : launch.items;
    const int64_t most = int64_t{Policy::kBlocksPerSm} * Policy::kWaves * job.multiprocessors;
    return Grid{static_cast<int>(min64(wanted, most)), kThreads, launch.row_mode ? 0 : Reader::kSharedBytes};
  });
}

// Launches the layers of one kind, as many in a table as it holds.
template <class Sums, class F, class L, class Table, class Hub = Policies>
void submit_tables(const Job& job, Kind kind) {
  const auto table = std::make_unique<Table>();
  Launch& launch = table->launch;
  launch.out = job.out;
  launch.partials = job.partials;
  launch.tickets = job.tickets;
  launch.coefficients = job.coefficients;
  launch.first = kind.first;
  launch.last = kind.last;
  launch.row_mode = kind.row_mode;
  launch.items = 0;
  table->clear();
  const auto flush = [&] {
    if (launch.items > 0) {
      start(segment_sums<Sums, F, L, Table, Hub>, *table, grid_of<Sums, F, L, Table, Hub>(job, launch), job.stream);
    }
    launch.items = 0;
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
      launch.items += layer.segments * items_of<Hub::Order::kChunk>(layer.width);
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
