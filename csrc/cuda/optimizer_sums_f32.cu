#include "submit.cuh"

template void fastfs::cuda::submit<fastfs::LinearSums, fastfs::F32>(const Job&, Kind);
template void fastfs::cuda::submit<fastfs::AdamSums, fastfs::F32>(const Job&, Kind);
template void fastfs::cuda::submit<fastfs::AdamaxSums, fastfs::F32>(const Job&, Kind);
template void fastfs::cuda::submit<fastfs::RmspropSums, fastfs::F32>(const Job&, Kind);
