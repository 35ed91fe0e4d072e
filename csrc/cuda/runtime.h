// The few calls of the CUDA runtime that the launchers make, checked. tests/cuda/on_cpu has a version for the host.
#pragma once

#if defined(FASTFS_CUDA_ON_CPU)
#include "shim_runtime.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastfs::cuda {

constexpr int kThreads = 256;

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that nobody else meets it
  throw std::runtime_error(std::string("fastfs: ") + what + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

// Makes `device` current, and what was current before when it goes out of scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// May a kernel have more than 4 KB of parameters? (The toolkit that this is compiled with must be of CUDA 12.1 too.)
inline bool large_parameters() {
#if CUDART_VERSION >= 12010
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  return driver >= 12010;
#else
  return false;
#endif
}

template <class Table, class... Rest>
void start(void (*kernel)(Table, Rest...), const Table& table, int blocks, int threads, void* stream, Rest... rest) {
  void* arguments[] = {const_cast<Table*>(&table), &rest...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), arguments, 0,
                         static_cast<cudaStream_t>(stream)),
        "cannot launch a kernel");
}

}  // namespace fastfs::cuda

#endif
