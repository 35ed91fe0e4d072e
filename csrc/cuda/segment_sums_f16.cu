#include "submit.cuh"

#define FASTFS_INSTANCE(name, Sums) template void fastfs::cuda::submit<fastfs::Sums, fastfs::F16>(const Job&, Kind);
FASTFS_TENSOR_MEASUREMENTS(FASTFS_INSTANCE)
