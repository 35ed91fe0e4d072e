// The entry points of the CUDA kernels of the measurements. Needs no CUDA header, so that binding/ is compiled by the
// C++ compiler.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../layers.h"

namespace fastfs::cuda {

// How the layers of a call are launched, and the device memory that this needs beside the output. Partials need no
// initialisation. Tickets are uint32, zero before the first launch; every launch leaves them zero, so launches on one
// stream can share them.
struct Plan {
  std::vector<uint8_t> kinds;    // of every layer: Kind::index() of submit.cuh
  std::vector<uint8_t> present;  // kinds with anything to do, ascending
  int64_t partial_bytes;
  int64_t tickets;
};

template <class Sums>
Plan plan(const std::vector<Layer>& layers);

// Writes Sums::kSums + 2 doubles (sums, nonfinite, count) per segment to `out`, segments of all layers in order. All
// pointers are device memory of `device`; work is queued on `stream` (a cudaStream_t) without synchronising. The
// calling thread's current device is kept. Throws std::runtime_error with CUDA's own text when a launch is refused.
// `coefficients`: those of all layers, in device memory, or null if they are in the layers (or there are none).
template <class Sums>
void launch(const std::vector<Layer>& layers, const Plan& plan, const double* coefficients, double* out, void* partials,
            uint32_t* tickets, int device, void* stream);

// Whether the stream is being captured into a graph.
bool capturing(int device, void* stream);

// Architectures compiled in, as "80,90,100,120+PTX"; runtime and driver versions as CUDA numbers them (driver 0: none).
std::string architectures();
int runtime_version();
int driver_version();

}  // namespace fastfs::cuda
