// Which loops this process uses.
#pragma once

#include "loops.h"

namespace fastfs::cpu {

const Loops& loops();  // chosen at the first call; throws std::runtime_error for a FASTFS_CPU that cannot be had

template <class Sums>
const ChunkTable<Sums>& table() {
  return loops().tables;
}

}  // namespace fastfs::cpu
