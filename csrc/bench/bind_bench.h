// The entry points of the streaming read; fastfs/_bench/ceilings.py calls them.
#pragma once

#include "../binding/tensors.h"
#include "stream_read.h"

namespace fastfs {
namespace {

constexpr int kInputs = 3;  // those of feature_stats, in any dtypes

LayerList read_contiguous(Exchange& exchange, const py::tuple& inputs, DLDeviceType device) {
  LayerList list = read_inputs<kInputs>(exchange, inputs, false, device);
  for (size_t n = 0; n < list.layers.size(); ++n) {
    for (int i = 0; i < kInputs; ++i) {
      if (!list.layers[n].contiguous[i]) refuse(n, "expected contiguous tensors");
    }
  }
  return list;
}

uint64_t stream_read_cpu(const py::tuple& inputs, int threads) {
  Exchange exchange;
  const LayerList list = read_contiguous(exchange, inputs, kDLCPU);
  checked_threads(threads);
  const py::gil_scoped_release released;
  return bench::stream_read_cpu(list.layers, kInputs, threads);
}

#ifdef FASTFS_WITH_CUDA
void stream_read_cuda(const py::tuple& inputs, const py::object& sink) {
  Exchange exchange;
  const LayerList list = read_contiguous(exchange, inputs, kDLCUDA);
  double* const to = output(exchange, sink, 1, 1, list.device);
  void* const stream = exchange.current_stream(list.device);
  const py::gil_scoped_release released;
  bench::stream_read_cuda(list.layers, kInputs, to, list.device.device_id, stream);
}
#endif

}  // namespace

inline void bind_bench(py::module_& m) {
  m.def("stream_read_cpu", &stream_read_cpu);
#ifdef FASTFS_WITH_CUDA
  m.def("stream_read_cuda", &stream_read_cuda);
#endif
}

}  // namespace fastfs
