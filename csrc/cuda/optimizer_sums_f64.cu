#include "submit.cuh"

template void fastfs::cuda::submit<fastfs::LinearSums, fastfs::F64>(const Job&, Kind);
template void fastfs::cuda::submit<fastfs::AdamSums, fastfs::F64>(const Job&, Kind);
template void fastfs::cuda::submit<fastfs::AdamaxSums, fastfs::F64>(const Job&, Kind);
template void fastfs::cuda::submit<fastfs::RmspropSums, fastfs::F64>(const Job&, Kind);
