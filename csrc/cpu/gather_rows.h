// The entry point of the CPU row loops.
#pragma once

#include "../rows.h"

namespace fastfs::cpu {

// Copies and casts the rows that `request` selects (unless its `to` is null), and writes the squared norm of each row
// as it is in x. Throws std::out_of_range, and writes nothing, if an index is out of range.
void gather_rows(const RowTensor& x, const RowRequest& request, int threads);

}  // namespace fastfs::cpu
