#include "submit.cuh"

template void fastfs::cuda::submit<fastfs::FeatureSums, fastfs::BF16>(const Job&, Kind);
template void fastfs::cuda::submit<fastfs::UpdateSums, fastfs::BF16>(const Job&, Kind);
