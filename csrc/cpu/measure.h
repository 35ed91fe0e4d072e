// The door to the CPU loops: all layers of a call, on threads, with the instruction set chosen once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../layers.h"
#include "../sums.h"
#include "../updates.h"

namespace fastfs::cpu {

// Writes Sums::kSums + 2 doubles (sums, nonfinite, count) per segment to `out`, segments of all layers in order.
template <class Sums>
void measure(const std::vector<Layer>& layers, double* out, int threads);

// Reads every byte of the (contiguous) inputs as fast as this machine can: the benchmarks' ceiling.
uint64_t stream_read(const std::vector<Layer>& layers, int inputs, int threads);

// Instruction sets compiled in, or those of them that this processor has, best last; and the one in use. FASTFS_CPU
// names another; one that is unknown, not compiled in or not supported by the processor throws std::runtime_error.
std::vector<std::string> instruction_sets(bool usable);
std::string instruction_set();
bool has_openmp();

}  // namespace fastfs::cpu
