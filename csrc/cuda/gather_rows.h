// The door to the CUDA row kernels. Needs no CUDA header.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace fastfs::cuda {

// Doubles of device memory that gather_rows() needs beside its output; they need no initialisation.
int64_t row_partials(int64_t kept, int64_t width);

// Takes the rows that `request` names: copies and casts them (unless it has no `to`), and writes the squared norm of
// each as it is in x. A number that is not that of a row gives a row and a norm of NaN, and reads nothing. All pointers
// are device memory of `device`; work is queued on `stream` (a cudaStream_t) without synchronising.
void gather_rows(const RowTensor& x, const RowRequest& request, double* partials, int device, void* stream);

}  // namespace fastfs::cuda
