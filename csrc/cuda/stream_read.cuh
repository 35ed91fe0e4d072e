// Reads every byte of the inputs and does next to nothing with it: what the device's memory allows, for the benchmarks. Same table,
// same persistent grid, same 16-byte loads as segment_sums, with more of them under way.
#pragma once

#include <memory>
#include <vector>

#include "load.cuh"
#include "runtime.h"

namespace fastfs::cuda {

constexpr int kReadBlocksPerSm = 4;

template <int kThreads>
__device__ __forceinline__ uint32_t read_bytes(const char* p, int64_t bytes) {
  constexpr int kUnroll = 8;
  uint32_t mixed = 0;
  const int64_t head = min64(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) & 15));
  const int64_t words = (bytes - head) / 16;
  const uint4* q = reinterpret_cast<const uint4*>(p + head);
  int64_t i = threadIdx.x;
#pragma unroll 1
  for (; i + (kUnroll - 1) * kThreads < words; i += kUnroll * kThreads) {
    uint4 w[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) w[u] = __ldg(q + i + u * kThreads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) mixed ^= w[u].x ^ w[u].y ^ w[u].z ^ w[u].w;
  }
#pragma unroll 1
  for (; i < words; i += kThreads) {
    const uint4 w = __ldg(q + i);
    mixed ^= w.x ^ w.y ^ w.z ^ w.w;
  }
  const int64_t tail = head + words * 16;
  if (threadIdx.x < head) mixed ^= static_cast<uint8_t>(__ldg(p + threadIdx.x));
  if (tail + threadIdx.x < bytes) mixed ^= static_cast<uint8_t>(__ldg(p + tail + threadIdx.x));
  return mixed;
}

// Items are chunks of whole layers; an entry's first_row holds the item sizes of its inputs, a byte each. The word that all threads
// mix is written only if it has one value in 2^32, and once by thread 0, so that the loads cannot be left out.
template <class Table, int kThreads>
__global__ void __launch_bounds__(kThreads, kReadBlocksPerSm)
    stream_read_kernel(const __grid_constant__ Table table, int inputs) {
  uint32_t mixed = 0;
  int entry = 0;
#pragma unroll 1
  for (int64_t number = blockIdx.x; number < table.launch.items; number += gridDim.x) {
    const Item item = locate(table, number, entry);
    entry = item.entry;
#pragma unroll 1
    for (int j = 0; j < inputs; ++j) {
      const int64_t size = table.first_row(entry) >> 8 * j & 0xff;
      mixed ^= read_bytes<kThreads>(table.entry[entry].data[j] + item.begin * size, item.count * size);
    }
  }
  if (mixed == 0x9e3779b9u || (blockIdx.x == 0 && threadIdx.x == 0)) *table.launch.out = mixed;
}

template <class Table>
void submit_reads_with(const std::vector<Layer>& layers, int inputs, double* sink, int multiprocessors, void* stream) {
  const auto table = std::make_unique<Table>();
  Launch& launch = table->launch;
  launch = Launch{};
  launch.out = sink;
  const auto flush = [&] {
    if (launch.items > 0) {
      const int64_t blocks = min64(launch.items, static_cast<int64_t>(kReadBlocksPerSm) * multiprocessors);
      start(stream_read_kernel<Table, kThreads>, *table, static_cast<int>(blocks), kThreads, stream, inputs);
    }
    launch.items = 0;
    table->clear();
  };
  for (Layer layer : layers) {
    layer.width *= layer.segments;
    int64_t sizes = 0;
    for (int j = 0; j < inputs; ++j) sizes |= item_size(j == inputs - 1 ? layer.last : layer.first) << 8 * j;
    if (layer.width == 0) continue;
    if (!table->add(layer, launch.items, sizes)) {
      flush();
      table->add(layer, 0, sizes);
    }
    launch.items += items_of(layer.width);
  }
  flush();
}

inline void submit_reads(const std::vector<Layer>& layers, int inputs, double* sink, int multiprocessors,
                         bool large_parameters, void* stream) {
#if defined(FASTFS_CUDA_ON_CPU) || CUDART_VERSION >= 12010
  using Large = DenseTable<kMaxInputs, kLargeTable>;
  if (large_parameters) return submit_reads_with<Large>(layers, inputs, sink, multiprocessors, stream);
#endif
  submit_reads_with<DenseTable<kMaxInputs, kSmallTable>>(layers, inputs, sink, multiprocessors, stream);
}

}  // namespace fastfs::cuda
