#include "submit.cuh"

template void fastfs::cuda::submit<fastfs::LinearSums, fastfs::F16>(const Job&, Kind);
