// Runs CUDA C++ kernels on the host: one fiber per CUDA thread, blocks one after another. README.md says what it can
// show.
#pragma once
#if defined(__CUDACC__)
#error "host shim is for the host compiler only"
#endif
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#if defined(SHIM_SHARED_STATIC)  // ASan: plain statics get red zones; one OS thread runs all blocks
#define __shared__ static
#else
#define __shared__ static thread_local
#endif
#define SHIM_DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(shim::dyn_shared())
#include <vector_types.h>  // NVIDIA's own uint4, dim3, ...

namespace shim {
struct Fiber {
  uint3 tid;
  unsigned lin;
  bool done;
  void* sp;
  char* stack;
  void* tsan;
  void* fake;
  const char* where;
  bool fenced;
  void* rmw;
};
extern thread_local Fiber* cur;
extern thread_local uint3 bid;
extern dim3 grid, block;
extern thread_local int r_or, r_and, r_cnt;
enum Kind : unsigned char { SHFL = 1, BALLOT, SYNCWARP };
void barrier(int pred, const char* where);
uint64_t warp_op(unsigned mask, Kind k, uint64_t v, int src, bool order, const char* where);
void fence();
void atomic_begin(void*);
void atomic_end(void*);
char* dyn_shared();
void run_grid(dim3 grid, dim3 block, size_t dyn_bytes, const std::function<void()>& fn);
template <class T>
inline uint64_t pack(T v) {
  static_assert(sizeof(T) <= 8, "");
  uint64_t u = 0;
  memcpy(&u, &v, sizeof v);
  return u;
}
template <class T>
inline T unpack(uint64_t u) {
  T v;
  memcpy((void*)&v, &u, sizeof v);
  return v;
}
}  // namespace shim
#define SHIM_STR2(x) #x
#define SHIM_STR(x) SHIM_STR2(x)
#define SHIM_HERE __FILE__ ":" SHIM_STR(__LINE__)
#define threadIdx (shim::cur->tid)
#define blockIdx (shim::bid)
#define blockDim (shim::block)
#define gridDim (shim::grid)
#define warpSize 32
#define __syncthreads() shim::barrier(0, SHIM_HERE)
#define __syncthreads_or(p) (shim::barrier(p, SHIM_HERE), shim::r_or)
#define __syncthreads_and(p) (shim::barrier(p, SHIM_HERE), shim::r_and)
#define __syncthreads_count(p) (shim::barrier(p, SHIM_HERE), shim::r_cnt)
namespace shim {
inline int lane() { return cur->lin & 31; }
template <class T>
inline T shfl(unsigned m, T v, int src, const char* w) {
  return unpack<T>(warp_op(m, SHFL, pack(v), src, false, w));
}
inline int s_xor(int o, int W) {
  int l = lane(), s = l ^ o;
  return (s / W <= l / W) ? s : -1;
}
inline int s_down(int o, int W) {
  int l = lane();
  return (l % W) + o < W ? l + o : -1;
}
inline int s_up(int o, int W) {
  int l = lane();
  return (l % W) - o >= 0 ? l - o : -1;
}
inline int s_idx(int i, int W) {
  int l = lane();
  return l / W * W + (i & (W - 1));
}
}  // namespace shim
#define SHIM_W(...) SHIM_W_(__VA_ARGS__, 32, 0)
#define SHIM_W_(a, b, ...) b
template <class T>
inline T __shfl_xor_sync(unsigned m, T v, int o, int W = 32) {
  return shim::shfl(m, v, shim::s_xor(o, W), "__shfl_xor_sync");
}
template <class T>
inline T __shfl_down_sync(unsigned m, T v, unsigned o, int W = 32) {
  return shim::shfl(m, v, shim::s_down(o, W), "__shfl_down_sync");
}
template <class T>
inline T __shfl_up_sync(unsigned m, T v, unsigned o, int W = 32) {
  return shim::shfl(m, v, shim::s_up(o, W), "__shfl_up_sync");
}
template <class T>
inline T __shfl_sync(unsigned m, T v, int i, int W = 32) {
  return shim::shfl(m, v, shim::s_idx(i, W), "__shfl_sync");
}
inline unsigned __ballot_sync(unsigned m, int p) {
  return (unsigned)shim::warp_op(m, shim::BALLOT, !!p, 0, false, "__ballot_sync");
}
inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == m; }
inline void __syncwarp(unsigned m = ~0u) { shim::warp_op(m, shim::SYNCWARP, 0, 0, true, "__syncwarp"); }
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
inline unsigned __float_as_uint(float f) { return shim::unpack<unsigned>(shim::pack(f)); }
inline float __uint_as_float(unsigned u) { return shim::unpack<float>(u); }
inline int __float_as_int(float f) { return shim::unpack<int>(shim::pack(f)); }
inline float __int_as_float(int u) { return shim::unpack<float>((unsigned)u); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline void __threadfence() { shim::fence(); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
// CUDA atomics are relaxed: they order something only after a fence of the writer and before a fence of the reader.
template <class T, class Op>
inline T shim_rmw(T* a, Op op) {
  shim::atomic_begin(a);
  T o = __atomic_load_n(a, __ATOMIC_RELAXED), n;
  do n = op(o);
  while (!__atomic_compare_exchange_n(a, &o, n, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  shim::atomic_end(a);
  return o;
}
inline unsigned atomicInc(unsigned* a, unsigned lim) {
  return shim_rmw(a, [=](unsigned o) { return o >= lim ? 0u : o + 1; });
}
inline unsigned atomicAdd(unsigned* a, unsigned v) {
  return shim_rmw(a, [=](unsigned o) { return o + v; });
}
inline int atomicAdd(int* a, int v) {
  return shim_rmw(a, [=](int o) { return o + v; });
}
inline unsigned long long atomicAdd(unsigned long long* a, unsigned long long v) {
  return shim_rmw(a, [=](unsigned long long o) { return o + v; });
}
inline float atomicAdd(float* a, float v) {
  return shim::unpack<float>(
      shim_rmw((unsigned*)a, [=](unsigned o) { return __float_as_uint(__uint_as_float(o) + v); }));
}
template <class T>
inline T atomicMax(T* a, T v) {
  return shim_rmw(a, [=](T o) { return o > v ? o : v; });
}
template <class T>
inline T atomicMin(T* a, T v) {
  return shim_rmw(a, [=](T o) { return o < v ? o : v; });
}
template <class T>
inline T atomicExch(T* a, T v) {
  return shim_rmw(a, [=](T) { return v; });
}
template <class T>
inline T atomicCAS(T* a, T c, T v) {
  return shim_rmw(a, [=](T o) { return o == c ? v : o; });
}
#define SHIM_LAUNCH(kernel, grid, block, smem, ...) shim::run_grid(grid, block, smem, [&] { kernel(__VA_ARGS__); })
