// The CPU loops over one chunk, compiled once per instruction set: loops_generic.cpp, loops_avx2.cpp, loops_avx512.cpp.
//
// Every instruction set computes with the same 16 lanes: lane i takes the elements whose index is i modulo 16. The
// float accumulator of a lane takes kChain elements and is added to a double; the 16 doubles are added as a fixed tree.
// So all instruction sets give the same bits. One with registers of 8 lanes walks each run twice, half the lanes at a
// time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../layers.h"
#include "../measurements.h"
#include "../rows.h"

namespace fastfs::cpu {

constexpr int kLanes = 16;

// Computes the sums of one chunk: n <= kChunk elements, contiguous at inputs[0..Sums::kInputs), of a layer with these
// coefficients.
using ChunkFunction = void (*)(const char* const* inputs, int64_t n, const double* coefficients, double* sums);

// Loops over other dtypes are left out to keep the build short: their inputs are widened first, a chunk at a time.
template <class Sums>
struct ChunkTable {
  // [first][last] in the order of DType, computed in float; null unless they are the same or one of them is float32.
  ChunkFunction single[4][4];
  ChunkFunction dbl[4];  // [first], computed in double from inputs that are all widened to double
};

// Copies n <= kChunk elements to a wider type, and zeros up to a multiple of kLanes.
using WideningFunction = void (*)(const char* from, char* to, int64_t n);
struct Widening {
  WideningFunction to_single[2];  // of float16 and bfloat16
  WideningFunction to_double[3];  // of float16, bfloat16 and float32
};

// A ChunkTable of every measurement.
struct NoLoops {};
#define FASTFS_TABLE(name, Sums) , ChunkTable<Sums>
struct SumLoops : NoLoops FASTFS_MEASUREMENTS(FASTFS_TABLE) {};
#undef FASTFS_TABLE

// Sums the squares of n <= kChunk contiguous elements at `from`, and casts them to `to` in the same pass.
using RowFunction = double (*)(const char* from, char* to, int64_t n);

struct RowLoops {
  RowFunction copy[4][4];  // [from][to] in the order of DType
  RowFunction squares[4];  // does not copy: `to` is not used
};

struct Loops {
  const char* name;
  const SumLoops& sums;
  const Widening& widening;
  const RowLoops& rows;
};

const Loops& loops_generic();
#ifdef FASTFS_X86
const Loops& loops_avx2();
const Loops& loops_avx512();
#endif

}  // namespace fastfs::cpu
