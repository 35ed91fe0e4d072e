// The entry points of the CPU loops.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../layers.h"

namespace fastfs::cpu {

// Writes Sums::kSums + 2 doubles (sums, nonfinite, count) per segment to `out`, the segments of all layers in order.
// Uses up to `threads` threads.
template <class Sums>
void measure(const std::vector<Layer>& layers, double* out, int threads);

// The instruction sets compiled in, or those of them that the processor has, best last; and the one in use, which
// FASTFS_CPU may choose. Throws std::runtime_error if that is unknown, not compiled in or not supported.
std::vector<std::string> instruction_sets(bool usable);
std::string instruction_set();
bool has_openmp();

}  // namespace fastfs::cpu
