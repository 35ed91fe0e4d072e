// benchmarks/tuning/bulk_primitives.cuh for the host: barriers in shared memory and copies that report to them.
//
// A copy lands as late as it may: from its start on the destination holds 0x3f in every byte, and the bytes come when
// somebody waits for the barrier. So who reads without waiting, or waits for the wrong phase, computes with wrong
// numbers (no NaN: a chunk with NaN would be done again, from global memory).
#pragma once

#include "shim_runtime.h"

namespace fastfs::cuda {

inline char* dynamic_shared() { return shim::dyn_shared(); }
inline void barrier_init(uint64_t* barrier, uint32_t count) { shim::bulk_init(barrier, count); }
inline void barrier_init_done() {}
inline void barrier_arrive(uint64_t* barrier) { shim::bulk_arrive(barrier, 0); }
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) { shim::bulk_arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) { shim::bulk_wait(barrier, parity, "barrier_wait"); }
inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  shim::bulk_load(to, from, bytes, barrier);
}

}  // namespace fastfs::cuda
