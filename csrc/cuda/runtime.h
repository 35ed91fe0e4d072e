// The few calls of the CUDA runtime that the launchers make, checked. tests/cuda/on_cpu has a version for the host.
#pragma once

#if defined(FASTFS_CUDA_ON_CPU)
#include "shim_runtime.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastfs::cuda {

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

// The architecture that the kernels of a device were compiled for, as a value of __CUDA_ARCH__: the newest one in the
// build that the device is not older than.
inline int architecture(int device) {
  int major = 0, minor = 0, found = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  for (const int compiled : {__CUDA_ARCH_LIST__}) {  // ascending
    if (compiled <= 100 * major + 10 * minor) found = compiled;
  }
  return found;
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

struct Grid {
  int blocks, threads, shared_bytes = 0;  // dynamic shared memory of a block
};

template <class Table>
void start(void (*kernel)(Table), const Table& table, const Grid& grid, void* stream) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (grid.shared_bytes > 0) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes),
          "cudaFuncSetAttribute");
  }
  void* arguments[] = {const_cast<Table*>(&table)};
  check(cudaLaunchKernel(function, dim3(grid.blocks), dim3(grid.threads), arguments,
                         static_cast<size_t>(grid.shared_bytes), static_cast<cudaStream_t>(stream)),
        "cannot launch a kernel");
}

}  // namespace fastfs::cuda

#endif
