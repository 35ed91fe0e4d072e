// csrc/cuda/runtime.h for the host: the same calls, with the multiprocessors and the parameter size that a test asks
// for.
#pragma once

#include "policy.cuh"
#include "shim.h"

namespace fastfs::cuda {

struct Grid {
  int blocks, threads;
};

inline int fake_multiprocessors = 1, launches = 0;
inline bool fake_large_parameters = false;

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline int multiprocessors(int) { return fake_multiprocessors; }
inline bool large_parameters() { return fake_large_parameters; }
inline int architecture(int) { return kTargetArchitecture; }

template <class Table>
void start(void (*kernel)(Table), const Table& table, const Grid& grid, void*) {
  static_assert(sizeof(Table) <= 32764, "kernel parameters");
  ++launches;
  shim::run_grid(dim3(grid.blocks), dim3(grid.threads), 0, [&] { kernel(table); });
}

}  // namespace fastfs::cuda
