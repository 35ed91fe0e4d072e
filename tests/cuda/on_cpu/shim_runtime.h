// csrc/cuda/runtime.h for the host: the same calls, with the multiprocessors and the parameter size that a test asks
// for.
#pragma once

#include "shim.h"

#ifndef FASTFS_SHIM_THREADS
#define FASTFS_SHIM_THREADS 256
#endif

namespace fastfs::cuda {

constexpr int kThreads = FASTFS_SHIM_THREADS;

inline int fake_multiprocessors = 1, launches = 0;
inline bool fake_large_parameters = false;

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline int multiprocessors(int) { return fake_multiprocessors; }
inline bool large_parameters() { return fake_large_parameters; }

template <class Table, class... Rest>
void start(void (*kernel)(Table, Rest...), const Table& table, int blocks, int threads, void*, Rest... rest) {
  static_assert(sizeof(Table) <= 32764, "kernel parameters");
  ++launches;
  shim::run_grid(dim3(blocks), dim3(threads), 0, [&] { kernel(table, rest...); });
}

}  // namespace fastfs::cuda
