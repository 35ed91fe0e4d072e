// Loads of 16 bytes with cache hints, as the Load of a policy.
#pragma once

#include <cstdint>

namespace fastfs::cuda {

#if defined(__CUDA_ARCH__)
#define TUNE_LOAD_WORDS(instruction)                                                                        \
  uint4 q;                                                                                                  \
  asm(instruction ".v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "l"(p)); \
  return q;
#else
#define TUNE_LOAD_WORDS(instruction) return __ldg(p);
#endif
#define TUNE_HINTED_LOAD(Name, instruction)                                                        \
  struct Name {                                                                                    \
    __device__ __forceinline__ static uint4 words(const uint4* p) { TUNE_LOAD_WORDS(instruction) } \
  };
TUNE_HINTED_LOAD(NoAllocateLoad, "ld.global.nc.L1::no_allocate")
TUNE_HINTED_LOAD(Prefetch256Load, "ld.global.nc.L2::256B")
#undef TUNE_HINTED_LOAD
#undef TUNE_LOAD_WORDS

struct EvictFirstLoad {
  __device__ __forceinline__ static uint4 words(const uint4* p) {
#if defined(__CUDA_ARCH__)
    uint64_t policy;
    uint4 q;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm("ld.global.nc.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
        : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
        : "l"(p), "l"(policy));
    return q;
#else
    return __ldg(p);
#endif
  }
};

}  // namespace fastfs::cuda
