// The kernels of all measurements for tensors with gaps or another order, and for double.
#include "submit.cuh"

#define FASTFS_INSTANCE(name, Sums)                                                      \
  template void fastfs::cuda::submit<fastfs::Sums, fastfs::cuda::Any>(const Job&, Kind); \
  template void fastfs::cuda::submit<fastfs::Sums, fastfs::F64>(const Job&, Kind);
FASTFS_MEASUREMENTS(FASTFS_INSTANCE)
