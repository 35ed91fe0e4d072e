#include "stream_read.cuh"

#include "stream_read.h"

namespace fastfs::bench {

void stream_read_cuda(const std::vector<Layer>& layers, int inputs, double* sink, int device, void* stream) {
  const cuda::DeviceGuard guard(device);
  cuda::submit_reads(layers, inputs, sink, cuda::multiprocessors(device), cuda::architecture(device),
                     cuda::large_parameters(), stream);
}

}  // namespace fastfs::bench
