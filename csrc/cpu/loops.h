// The CPU loops over one chunk, once per instruction set (loops_generic.cpp, loops_avx2.cpp, loops_avx512.cpp).
//
// Every instruction set computes with the same 16 lanes: lane i takes the elements whose index is i modulo 16. A lane's
// float accumulator takes kChain elements and is added to a double; the 16 doubles are added as a fixed tree. So all
// instruction sets give the same bits. One with registers of 8 lanes walks each run twice, half the lanes at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../layers.h"
#include "../sums.h"
#include "../updates.h"

namespace fastfs::cpu {

constexpr int kLanes = 16;

// Sums of one chunk of n <= kChunk elements that are contiguous at inputs[0..Sums::kInputs), of a layer with these
// coefficients.
using ChunkFunction = void (*)(const char* const* inputs, int64_t n, const double* coefficients, double* sums);

template <class Sums>
struct ChunkTable {
  ChunkFunction single[4][4];  // [first][last] computed in float; null where one of them is float64
  ChunkFunction dbl[4][4];     // computed in double; null for dtypes that the measurement does not take
};

struct Tables : ChunkTable<FeatureSums>,
                ChunkTable<UpdateSums>,
                ChunkTable<LinearSums>,
                ChunkTable<AdamSums>,
                ChunkTable<AdamaxSums>,
                ChunkTable<RmspropSums> {};

struct Loops {
  const char* name;
  const Tables& tables;
  uint64_t (*read)(const char* data, int64_t bytes);  // touches every byte: the streaming-read ceiling
};

const Loops& loops_generic();
#ifdef FASTFS_X86
const Loops& loops_avx2();
const Loops& loops_avx512();
#endif

}  // namespace fastfs::cpu
