// The kernels of feature_stats and update_stats for contiguous tensors, except those of double.
#include "submit.cuh"

#define FASTFS_INSTANCE(name, Sums)                                                 \
  template void fastfs::cuda::submit<fastfs::Sums, fastfs::F16>(const Job&, Kind);  \
  template void fastfs::cuda::submit<fastfs::Sums, fastfs::BF16>(const Job&, Kind); \
  template void fastfs::cuda::submit<fastfs::Sums, fastfs::F32>(const Job&, Kind);
FASTFS_TENSOR_MEASUREMENTS(FASTFS_INSTANCE)
