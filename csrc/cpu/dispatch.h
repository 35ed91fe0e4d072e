// The loops that this process uses.
#pragma once

#include "loops.h"

namespace fastfs::cpu {

// Chosen at the first call. Throws std::runtime_error if FASTFS_CPU names an instruction set that cannot be used.
const Loops& loops();

}  // namespace fastfs::cpu
