#include "submit.cuh"

#define FASTFS_INSTANCE(name, Sums) template void fastfs::cuda::submit<fastfs::Sums, fastfs::F32>(const Job&, Kind);
FASTFS_OPTIMIZER_MEASUREMENTS(FASTFS_INSTANCE)
