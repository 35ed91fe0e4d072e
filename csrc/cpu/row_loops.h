// The CPU loops over a piece of a row, once per instruction set (row_loops_generic.cpp, _avx2.cpp, _avx512.cpp): cast,
// copy and squares in one pass. As in loops.h all instruction sets compute with the same 16 lanes and the same chains,
// and so give the same bits.
#pragma once

#include <cstdint>

#include "../layers.h"
#include "../sums.h"
#include "loops.h"

namespace fastfs::cpu {

// The squares of n <= kChunk contiguous elements at `from`, summed; they are cast to `to` on the way.
using CopyFunction = double (*)(const char* from, char* to, int64_t n);

struct RowLoops {
  CopyFunction copy[4][4];  // [from][to], in the order of DType
  CopyFunction squares[4];  // without the copy: `to` is not used
};

extern const RowLoops kRowsGeneric;
#ifdef FASTFS_X86
extern const RowLoops kRowsAvx2;
extern const RowLoops kRowsAvx512;
#endif

}  // namespace fastfs::cpu
