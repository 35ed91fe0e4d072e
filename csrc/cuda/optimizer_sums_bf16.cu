#include "submit.cuh"

template void fastfs::cuda::submit<fastfs::LinearSums, fastfs::BF16>(const Job&, Kind);
