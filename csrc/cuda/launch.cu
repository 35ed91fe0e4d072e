// The entry points of launch.h: sorts layers into kinds and launches the kernels of each kind.
#include "launch.h"

#include <algorithm>

#include "submit.cuh"

#ifndef FASTFS_ARCHITECTURES
#define FASTFS_ARCHITECTURES "unknown"
#endif

namespace fastfs::cuda {

#if !defined(FASTFS_CUDA_ON_CPU)  // there everything is one file
#define FASTFS_EXTERN(name, Sums)                            \
  extern template void submit<Sums, F16>(const Job&, Kind);  \
  extern template void submit<Sums, BF16>(const Job&, Kind); \
  extern template void submit<Sums, F32>(const Job&, Kind);  \
  extern template void submit<Sums, Any>(const Job&, Kind);  \
  extern template void submit<Sums, F64>(const Job&, Kind);
FASTFS_MEASUREMENTS(FASTFS_EXTERN)
#undef FASTFS_EXTERN
#endif

namespace {

// Work items that need partials and tickets, at most. Launches of one kind, and kinds, run one after another on the
// stream, so they share this memory.
template <class Sums>
int64_t items_with_partials(const std::vector<Layer>& layers) {
  constexpr int64_t kChunk = Policies::Order::kChunk;
  int64_t items[Kind::kKinds] = {};
  bool needed[Kind::kKinds] = {};
  for (const Layer& layer : layers) {
    const Kind kind = kind_of(layer, Sums::kInputs, Policies::Order::kWarpRow);
    if (kind.row_mode) continue;
    items[kind.index()] += layer.segments * items_of<kChunk>(layer.width);
    needed[kind.index()] = needed[kind.index()] || (layer.segments > 0 && layer.width > kChunk);
  }
  int64_t most = 0;
  for (int k = 0; k < Kind::kKinds; ++k) most = std::max(most, needed[k] ? items[k] : 0);
  return most;
}

}  // namespace

template <class Sums>
Workspace workspace(const std::vector<Layer>& layers) {
  const int64_t items = items_with_partials<Sums>(layers);
  return Workspace{items * kSlots<Sums> * static_cast<int64_t>(sizeof(double)), items};
}

template <class Sums>
void launch(const std::vector<Layer>& layers, const double* coefficients, double* out, void* partials,
            uint32_t* tickets, int device, void* stream) {
  std::vector<uint8_t> kinds(layers.size());
  bool present[Kind::kKinds] = {};
  for (size_t i = 0; i < layers.size(); ++i) {
    const int kind = kind_of(layers[i], Sums::kInputs, Policies::Order::kWarpRow).index();
    kinds[i] = static_cast<uint8_t>(kind);
    present[kind] = present[kind] || layers[i].segments > 0;
  }
  if (std::none_of(present, present + Kind::kKinds, [](bool p) { return p; })) return;
  const DeviceGuard guard(device);
  const Job job{layers,
                kinds,
                coefficients,
                out,
                static_cast<double*>(partials),
                tickets,
                multiprocessors(device),
                architecture(device),
                large_parameters(),
                stream};
  for (int k = 0; k < Kind::kKinds; ++k) {
    if (!present[k]) continue;
    const Kind kind = Kind::at(k);
    if (kind.strided && kind.first != DType::f64) {
      submit<Sums, Any>(job, kind);
      continue;
    }
    switch (kind.first) {
      case DType::f16:
        submit<Sums, F16>(job, kind);
        break;
      case DType::bf16:
        submit<Sums, BF16>(job, kind);
        break;
      case DType::f32:
        submit<Sums, F32>(job, kind);
        break;
      case DType::f64:
        submit<Sums, F64>(job, kind);
        break;
    }
  }
}

#define FASTFS_INSTANCE(name, Sums)                              \
  template Workspace workspace<Sums>(const std::vector<Layer>&); \
  template void launch<Sums>(const std::vector<Layer>&, const double*, double*, void*, uint32_t*, int, void*);
FASTFS_MEASUREMENTS(FASTFS_INSTANCE)
#undef FASTFS_INSTANCE

std::string architectures() { return FASTFS_ARCHITECTURES; }

#if !defined(FASTFS_CUDA_ON_CPU)
bool capturing(int device, void* stream) {
  const DeviceGuard guard(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
#endif

}  // namespace fastfs::cuda
