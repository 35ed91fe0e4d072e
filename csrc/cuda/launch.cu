// The entry points of launch.h: sorts layers into kinds and launches the kernels of each kind.
#include "launch.h"

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

template <class Sums>
Plan plan(const std::vector<Layer>& layers) {
  Plan result{};
  result.kinds.resize(layers.size());
  int64_t items[Kind::kKinds] = {};
  bool present[Kind::kKinds] = {}, partials[Kind::kKinds] = {};
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const Kind kind = kind_of(layer, Sums::kInputs);
    const int k = kind.index();
    result.kinds[i] = static_cast<uint8_t>(k);
    if (layer.segments == 0) continue;
    present[k] = true;
    if (kind.team < Policies::Order::kThreads) continue;
    const int64_t chunks = chunks_of_segment(layer);
    items[k] += layer.segments * chunks;
    partials[k] = partials[k] || chunks > 1;
  }
  for (int k = 0; k < Kind::kKinds; ++k) {
    if (present[k]) result.present.push_back(static_cast<uint8_t>(k));
    // Launches run one after another on the stream, so they share this memory.
    if (partials[k]) result.tickets = max64(result.tickets, items[k]);
  }
  result.partial_bytes = result.tickets * kSlots<Sums> * static_cast<int64_t>(sizeof(double));
  return result;
}

template <class Sums>
void launch(const std::vector<Layer>& layers, const Plan& plan, const double* coefficients, double* out, void* partials,
            uint32_t* tickets, int device, void* stream) {
  if (plan.present.empty()) return;
  const DeviceGuard guard(device);
  const Job job{layers,  plan.kinds,         coefficients, out, static_cast<double*>(partials),
                tickets, large_parameters(), stream};
  for (const uint8_t k : plan.present) {
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

#define FASTFS_INSTANCE(name, Sums)                                                                                 \
  template Plan plan<Sums>(const std::vector<Layer>&);                                                              \
  template void launch<Sums>(const std::vector<Layer>&, const Plan&, const double*, double*, void*, uint32_t*, int, \
                             void*);
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
