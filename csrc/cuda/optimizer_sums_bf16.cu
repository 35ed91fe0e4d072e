#include "submit.cuh"

#define FASTFS_INSTANCE(name, Sums) template void fastfs::cuda::submit<fastfs::Sums, fastfs::BF16>(const Job&, Kind);
FASTFS_OPTIMIZER_MEASUREMENTS(FASTFS_INSTANCE)
