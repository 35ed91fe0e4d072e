// The door to the CPU row loops.
#pragma once

#include "../rows.h"

namespace fastfs::cpu {

// Takes the rows that `request` names: copies and casts them (unless it has no `to`), and writes the squared norm of
// each as it is in x. Throws std::out_of_range, and writes nothing, if a number is not that of a row.
void gather_rows(const RowTensor& x, const RowRequest& request, int threads);

}  // namespace fastfs::cpu
