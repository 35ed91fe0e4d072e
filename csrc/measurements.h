// The measurements. This list is the only one in C++: the loops of every instruction set (cpu/), the kernels of every
// dtype (cuda/) and the Python bindings (binding/bind_measurements.h) are instantiated from it.
// fastfs/_core/measurements.py declares the same kernels in Python; the two are compared when fastfs is imported.
#pragma once

#include "feature_sums.h"
#include "layers.h"
#include "parameter_sums.h"

// M(name, Sums): the name of the entry points in fastfs._C, without _cpu or _cuda, and the struct of sums.
// There are two groups only to spread the compilation for CUDA: cuda/segment_sums.cu and cuda/optimizer_sums.cu.
#define FASTFS_TENSOR_MEASUREMENTS(M) \
  M(feature_stats, FeatureSums)       \
  M(update_stats, UpdateSums)
#define FASTFS_OPTIMIZER_MEASUREMENTS(M) \
  M(linear_stats, LinearSums)            \
  M(adam_stats, AdamSums)                \
  M(adamax_stats, AdamaxSums)            \
  M(rmsprop_stats, RmspropSums)
#define FASTFS_MEASUREMENTS(M) FASTFS_TENSOR_MEASUREMENTS(M) FASTFS_OPTIMIZER_MEASUREMENTS(M)

namespace fastfs {

#define FASTFS_CHECK_LIMITS(name, Sums)                                                              \
  static_assert(Sums::kInputs <= kMaxInputs,                                                         \
                "csrc/layers.h: a Layer has no room for the inputs of " #name ": raise kMaxInputs"); \
  static_assert(Sums::kCoefficients <= kMaxCoefficients,                                             \
                "csrc/layers.h: a Layer has no room for the coefficients"                            \
                " of " #name ": raise kMaxCoefficients");                                            \
  static_assert(Sums::kCounted <= Sums::kInputs, #name " counts more inputs than it has");
FASTFS_MEASUREMENTS(FASTFS_CHECK_LIMITS)
#undef FASTFS_CHECK_LIMITS

}  // namespace fastfs
