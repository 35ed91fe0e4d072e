// The kernel that reads every byte of its inputs and does next to nothing with it: the ceiling of the benchmarks. It
// has the table, the persistent grid and the 16-byte loads of segment_sums.
#pragma once

#include <memory>
#include <vector>

#include "../cuda/load.cuh"
#include "../cuda/runtime.h"

namespace fastfs::cuda {

constexpr int kReadWord = 8;  // bytes of an "element" of the table
template <class Hub>
constexpr int kReadBits = Hub::Order::kReadBits - 3;  // elements of a chunk, as a power of two

// Reads the 16-byte words of one input in a chunk, and the bytes at both ends. Mixes them, so that the compiler cannot
// drop a load.
template <int kThreads, int kUnroll>
__device__ __forceinline__ uint32_t read_bytes(const char* p, int bytes) {
  uint32_t mixed = 0;
  const int start = static_cast<int>(-reinterpret_cast<uintptr_t>(p) & 15);
  const int head = start < bytes ? start : bytes;
  const int words = (bytes - head) / 16, tail = head + words * 16;
  const uint4* q = reinterpret_cast<const uint4*>(p + head);
  int i = threadIdx.x;
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
  const int thread = threadIdx.x;
  if (thread < head) mixed ^= static_cast<uint8_t>(__ldg(p + thread));
  if (tail + thread < bytes) mixed ^= static_cast<uint8_t>(__ldg(p + tail + thread));
  return mixed;
}

// An entry is one input: first_row holds its bytes, its width counts words of kReadWord bytes. A thread writes its
// mixed word if that has one value in 2^32, and thread 0 always does, so that the compiler cannot drop a load.
template <class Table, class Hub>
__global__ void __launch_bounds__(Hub::Order::kThreads, Hub::Active::StreamRead::kBlocksPerSm)
    stream_read_kernel(const __grid_constant__ Table table) {
  constexpr int kThreads = Hub::Order::kThreads, kUnroll = Hub::Active::StreamRead::kLoadsAhead;
  uint32_t mixed = 0;
  int entry = 0;
#pragma unroll 1
  for (int64_t number = blockIdx.x; number < table.launch.items; number += gridDim.x) {
    entry = entry_of(table, number, entry);
    const int64_t begin = item_at(table, number, entry, kReadBits<Hub>).begin * kReadWord;
    const int64_t bytes = min64(int64_t{1} << Hub::Order::kReadBits, table.first_row(entry) - begin);
    mixed ^= read_bytes<kThreads, kUnroll>(table.entry[entry].data[0] + begin, static_cast<int>(bytes));
  }
  if (mixed == 0x9e3779b9u || (blockIdx.x == 0 && threadIdx.x == 0)) *table.launch.out = mixed;
}

template <class Table, class Hub>
void submit_reads_with(const std::vector<Layer>& layers, int inputs, double* sink, int multiprocessors,
                       int architecture, void* stream) {
  const auto table = std::make_unique<Table>();
  Launch& launch = table->launch;
  launch = Launch{};
  launch.out = sink;
  const auto flush = [&] {
    if (launch.items > 0) {
      const int64_t resident =
          Hub::visit(architecture, [](auto policy) { return int64_t{decltype(policy)::StreamRead::kBlocksPerSm}; });
      const int blocks = static_cast<int>(min64(launch.items, resident * multiprocessors));
      start(stream_read_kernel<Table, Hub>, *table, Grid{blocks, Hub::Order::kThreads}, stream);
    }
    launch.items = 0;
    table->clear();
  };
  for (const Layer& layer : layers) {
    for (int j = 0; j < inputs; ++j) {
      const int64_t bytes = layer.segments * layer.width * item_size(j == inputs - 1 ? layer.last : layer.first);
      if (bytes == 0) continue;
      Layer one{};
      one.data[0] = layer.data[j];
      one.width = ceil_div(bytes, kReadWord);
      if (!table->add(one, launch.items, bytes)) {
        flush();
        table->add(one, 0, bytes);
      }
      launch.items += chunks_in(one.width, kReadBits<Hub>);
    }
  }
  flush();
}

template <class Hub = Policies>
void submit_reads(const std::vector<Layer>& layers, int inputs, double* sink, int multiprocessors, int architecture,
                  bool large_parameters, void* stream) {
#if defined(FASTFS_CUDA_ON_CPU) || CUDART_VERSION >= 12010
  using Large = DenseTable<1, kLargeTable>;
  if (large_parameters) {
    return submit_reads_with<Large, Hub>(layers, inputs, sink, multiprocessors, architecture, stream);
  }
#endif
  submit_reads_with<DenseTable<1, kSmallTable>, Hub>(layers, inputs, sink, multiprocessors, architecture, stream);
}

}  // namespace fastfs::cuda
