// Reading the inputs of a chunk when they have gaps or another order, or are double: see load.cuh.
#pragma once

#include "load.cuh"

namespace fastfs::cuda {

// The inputs of a chunk whose layer has gaps or another order: coordinates by division, once for a run that lies within
// the last dimension. With first inputs of f64 also that of contiguous layers, which are read as DenseSource reads
// them.
template <class Sums, class F, class L, class Load, class Table>
struct StridedSource {
  static constexpr int kInputs = Sums::kInputs, E = kRun<F>;
  const Table& table;
  const Item& item;
  DType first, any;
  int count;

  __device__ __forceinline__ StridedSource(const Table& t, const Item& i)
      : table(t), item(i), first(t.launch.first), any(t.launch.last), count(i.count) {}
  __device__ __forceinline__ int size(int j) const { return j == kInputs - 1 ? size_of<L>(any) : size_of<F>(first); }
  __device__ __forceinline__ int tiles(int most) const {
    return std::is_same_v<F, Any> && first == DType::f32 ? 1 : most;
  }
  __device__ __forceinline__ bool wide() const {
    if (!std::is_same_v<F, F64> || any != DType::f64) return false;
    bool all = true;
#pragma unroll
    for (int j = 0; j < kInputs; ++j) all = all && table.contiguous(item.entry, j) && aligned(dense(j, 0), 16);
    return all;
  }
  __device__ __forceinline__ void load(int at, Run<Sums, F, L>& e) const {
    if constexpr (std::is_same_v<F, F64>) {
#pragma unroll
      for (int j = 0; j < kInputs - 1; ++j) Reader<F, E, Load>::wide(dense(j, at), first, e.first[j]);
      Reader<L, E, Load>::wide(dense(kInputs - 1, at), any, e.last);
    }
  }

  // Where element `at` lies in every input; returns how many elements from there on are one run of the last dimension.
  __device__ __forceinline__ int64_t where(int at, const char* (&p)[kInputs]) const {
    const int e = item.entry;
    int64_t rest = item.begin + at, run = table.dims(e) == 0 ? count - at : 1;
    int64_t offset[kInputs];
#pragma unroll
    for (int j = 0; j < kInputs; ++j) offset[j] = table.contiguous(e, j) ? rest : 0;
#pragma unroll 1
    for (int d = table.dims(e) - 1; d >= 0; --d) {
      const int64_t extent = table.shape(e, d);
      const int64_t quotient =
          (rest | extent) >> 32 == 0 ? static_cast<uint32_t>(rest) / static_cast<uint32_t>(extent) : rest / extent;
      const int64_t index = rest - quotient * extent;
      if (d == table.dims(e) - 1) run = extent - index;
#pragma unroll
      for (int j = 0; j < kInputs; ++j) offset[j] += index * table.stride(e, j, d);
      rest = quotient;
    }
#pragma unroll
    for (int j = 0; j < kInputs; ++j) p[j] = table.data(e, j) + offset[j] * size(j);
    return run;
  }
  __device__ __forceinline__ void load_some(int at, Run<Sums, F, L>& e) const {
    const int valid = count - at < E ? count - at : E;
    if (valid <= 0) {
#pragma unroll
      for (int j = 0; j < kInputs - 1; ++j) zero<F>(e.first[j]);
      zero<L>(e.last);
      return;
    }
    const char* p[kInputs];
    int64_t run = 0;
#pragma unroll 1
    for (int i = 0; i < E && run < valid; ++i) {
      if (i < valid) run = where(at + i, p);
      if (i == 0 && run >= valid) {
#pragma unroll
        for (int j = 0; j < kInputs - 1; ++j) load_one<F>(p[j], j, valid, first, e.first[j]);
        load_one<L>(p[kInputs - 1], kInputs - 1, valid, any, e.last);
      } else {
        run = 0;
#pragma unroll
        for (int j = 0; j < kInputs - 1; ++j) Reader<F, E, Load>::push(p[j], i < valid, first, e.first[j]);
        Reader<L, E, Load>::push(p[kInputs - 1], i < valid, any, e.last);
      }
    }
#pragma unroll
    for (int j = 0; j < kInputs - 1; ++j) widen<F, E>(first, e.first[j]);
  }
  __device__ __forceinline__ void elements(int at, double (&x)[kInputs]) const {
    const char* p[kInputs];
    where(at, p);
#pragma unroll
    for (int j = 0; j < kInputs; ++j) x[j] = j == kInputs - 1 ? element_at<L>(p[j], any) : element_at<F>(p[j], first);
  }

 private:
  // Element `at` of a contiguous input of f64.
  __device__ __forceinline__ const char* dense(int j, int at) const {
    return table.data(item.entry, j) + (item.begin + at) * kItemSize<F64>;
  }
  template <class T>
  __device__ __forceinline__ static void zero(uint32_t (&w)[kWordsOf<T, E>]) {
#pragma unroll
    for (int i = 0; i < kWordsOf<T, E>; ++i) w[i] = 0;
  }
  template <class T>
  __device__ __forceinline__ void load_one(const char* p, int j, int valid, DType dtype,
                                           uint32_t (&w)[kWordsOf<T, E>]) const {
    const int e = item.entry;
    const int64_t step = table.contiguous(e, j) ? 1 : table.stride(e, j, table.dims(e) - 1);
    if (step == 1 && valid == E) {
      Reader<T, E, Load>::run(p, dtype, w);
    } else {
      Reader<T, E, Load>::elements(p, step * size(j), valid, dtype, w);
    }
  }
};

}  // namespace fastfs::cuda
