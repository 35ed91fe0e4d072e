#include "submit.cuh"

template void fastfs::cuda::submit<fastfs::FeatureSums, fastfs::F32>(const Job&, Kind);
template void fastfs::cuda::submit<fastfs::UpdateSums, fastfs::F32>(const Job&, Kind);
