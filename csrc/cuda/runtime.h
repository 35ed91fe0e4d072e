// The few calls of the CUDA runtime that the launchers make, checked. tests/cuda/on_cpu has a version for the host.
#pragma once

#if defined(FASTFS_CUDA_ON_CPU)
#include "shim_runtime.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

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

// What does not change while the process runs, asked for once.
struct DeviceFacts {
  int multiprocessors;
  int architecture;  // that its kernels were compiled for: the newest one in the build that the device is not older
                     // than
};

inline std::vector<DeviceFacts> read_devices() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  std::vector<DeviceFacts> devices(static_cast<size_t>(count));
  const auto attribute = [](cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
  };
  for (int device = 0; device < count; ++device) {
    DeviceFacts& facts = devices[static_cast<size_t>(device)];
    facts.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    const int capability = 100 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                           10 * attribute(cudaDevAttrComputeCapabilityMinor, device);
    for (const int compiled : {__CUDA_ARCH_LIST__}) {  // ascending
      if (compiled <= capability) facts.architecture = compiled;
    }
  }
  return devices;
}
inline const DeviceFacts& facts_of(int device) {
  static const std::vector<DeviceFacts> devices = read_devices();
  return devices.at(static_cast<size_t>(device));
}
inline int multiprocessors(int device) { return facts_of(device).multiprocessors; }
inline int architecture(int device) { return facts_of(device).architecture; }  // a value of __CUDA_ARCH__

// May a kernel have more than 4 KB of parameters? (The toolkit that this is compiled with must be of CUDA 12.1 too.)
inline bool large_parameters() {
#if CUDART_VERSION >= 12010
  static const bool large = [] {
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    return driver >= 12010;
  }();
  return large;
#else
  return false;
#endif
}

struct Grid {
  int blocks, threads;
};

template <class Table>
void start(void (*kernel)(Table), const Table& table, const Grid& grid, void* stream) {
  void* arguments[] = {const_cast<Table*>(&table)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.blocks), dim3(grid.threads), arguments, 0,
                         static_cast<cudaStream_t>(stream)),
        "cannot launch a kernel");
}

}  // namespace fastfs::cuda

#endif
