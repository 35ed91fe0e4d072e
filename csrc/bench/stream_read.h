// The streaming read: reads every byte of the inputs, all contiguous, as fast as the memory allows. The benchmarks
// measure the ceiling of the measurements with it; nothing else uses it.
#pragma once

#include <cstdint>
#include <vector>

#include "../layers.h"

namespace fastfs::bench {

// Returns a checksum, so that the compiler cannot drop a load.
uint64_t stream_read_cpu(const std::vector<Layer>& layers, int inputs, int threads);

// Queued on `stream`, a cudaStream_t. Writes one double to `sink`, in memory of `device`.
void stream_read_cuda(const std::vector<Layer>& layers, int inputs, double* sink, int device, void* stream);

}  // namespace fastfs::bench
