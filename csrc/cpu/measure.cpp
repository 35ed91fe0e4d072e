#include "measure.h"

#include <algorithm>
#include <memory>

#include "dispatch.h"
#include "parallel.h"

namespace fastfs::cpu {
namespace {

// A range of chunks that one thread computes at a time. Chunks are numbered through all segments of a layer.
struct Batch {
  size_t layer;
  int64_t begin, end;
  int64_t slot;  // of the first chunk, among the chunks of all layers
};

// Batches of about `grain` elements; `tasks[t]..tasks[t + 1]` are the batches of task t (several where layers are
// tiny).
struct Plan {
  std::vector<Batch> batches;
  std::vector<size_t> tasks{0};
  int64_t chunks = 0;
  int64_t elements = 0;

  Plan(const std::vector<Layer>& layers, int threads) {
    for (const Layer& l : layers) elements += l.segments * l.width;
    const int64_t grain = std::clamp(elements / (int64_t{8} * threads), int64_t{8} * kChunk, int64_t{64} * kChunk);
    int64_t filled = 0;
    for (size_t n = 0; n < layers.size(); ++n) {
      const Layer& l = layers[n];
      const int64_t all = l.segments * chunks_of(l);
      const int64_t size = std::max<int64_t>(std::min(l.width, kChunk), 1);
      for (int64_t c = 0; c < all;) {
        const int64_t take = std::min(all - c, std::max<int64_t>((grain - filled) / size, 1));
        batches.push_back({n, c, c + take, chunks + c});
        c += take;
        filled += take * size;
        if (filled >= grain) {
          tasks.push_back(batches.size());
          filled = 0;
        }
      }
      chunks += all;
    }
    if (tasks.back() != batches.size()) tasks.push_back(batches.size());
  }
  int64_t task_count() const { return static_cast<int64_t>(tasks.size()) - 1; }
};

template <class Word, Word Exponent>
double count_in(const char* p, int64_t n) {
  int64_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    Word u;
    std::memcpy(&u, p + i * sizeof u, sizeof u);
    bad += (u & Exponent) == Exponent;
  }
  return static_cast<double>(bad);
}
double count_nonfinite(DType d, const char* p, int64_t n) {
  switch (d) {
    case DType::f16:
      return count_in<uint16_t, 0x7c00u>(p, n);
    case DType::bf16:
      return count_in<uint16_t, 0x7f80u>(p, n);
    case DType::f32:
      return count_in<uint32_t, 0x7f800000u>(p, n);
    case DType::f64:
      return count_in<uint64_t, 0x7ff0000000000000u>(p, n);
  }
  return 0.0;
}

// A chunk in float: by the loop of its dtypes, or by that of a last input in float32.
void sum_single(const ChunkFunction (&loops_of_first)[4], const Layer& l, int count, const char* const* inputs,
                int64_t n, Gather& gather, double* sums) {
  const int last = static_cast<int>(l.last);
  if (loops_of_first[last] != nullptr) return loops_of_first[last](inputs, n, l.coefficients, sums);
  const char* wide[kMaxInputs];
  std::copy_n(inputs, count, wide);
  char* const to = gather.wide(count - 1);
  loops().widening.to_single[last](inputs[count - 1], to, n);
  wide[count - 1] = to;
  loops_of_first[static_cast<int>(DType::f32)](wide, n, l.coefficients, sums);
}

// A chunk in double, for all dtypes.
void sum_double(const ChunkFunction (&loops_of)[4], const Layer& l, int count, const char* const* inputs, int64_t n,
                Gather& gather, double* sums) {
  const char* wide[kMaxInputs];
  for (int i = 0; i < count; ++i) {
    const DType d = i + 1 < count ? l.first : l.last;
    wide[i] = inputs[i];
    if (d == DType::f64) continue;
    char* const to = gather.wide(i);
    loops().widening.to_double[static_cast<int>(d)](inputs[i], to, n);
    wide[i] = to;
  }
  loops_of[static_cast<int>(l.first)](wide, n, l.coefficients, sums);
}

template <class Sums>
Partial<Sums> measure_chunk(const ChunkTable<Sums>& table, const Layer& l, const char* const* inputs, int64_t n,
                            Gather& gather) {
  Partial<Sums> p;
  p.nonfinite = 0.0;
  const bool single = l.first != DType::f64 && l.last != DType::f64;
  if (single) {
    sum_single(table.single[static_cast<int>(l.first)], l, Sums::kInputs, inputs, n, gather, p.sum);
  } else {
    sum_double(table.dbl, l, Sums::kInputs, inputs, n, gather, p.sum);
  }
  if (needs_double(p)) {
    if (single) sum_double(table.dbl, l, Sums::kInputs, inputs, n, gather, p.sum);
    for (int i = 0; i < Sums::kCounted; ++i) {
      p.nonfinite += count_nonfinite(i + 1 < Sums::kInputs ? l.first : l.last, inputs[i], n);
    }
  }
  return p;
}

// Sum of n partials in index order: groups one after another, the groups pairwise, so that the error grows with log n.
template <class Sums>
Partial<Sums> merged(const Partial<Sums>* p, int64_t n) {
  Partial<Sums> sum;
  if (n > kGroupChunks) {
    const int64_t left = ceil_div(ceil_div(n, kGroupChunks), 2) * kGroupChunks;
    sum = merged(p, left);
    merge(sum, merged(p + left, n - left));
    return sum;
  }
  clear(sum);
  for (int64_t i = 0; i < n; ++i) merge(sum, p[i]);
  return sum;
}

}  // namespace

template <class Sums>
void measure(const std::vector<Layer>& layers, double* out, int threads) {
  const ChunkTable<Sums>& chunk_table = loops().sums;
  const Plan plan(layers, threads);
  const std::unique_ptr<Partial<Sums>[]> partials(new Partial<Sums>[static_cast<size_t>(plan.chunks)]);
  parallel(plan.task_count(), plan.elements < kSerial ? 1 : threads, [&](Gather& gather, int64_t task) {
    for (size_t b = plan.tasks[task]; b < plan.tasks[task + 1]; ++b) {
      const Batch& batch = plan.batches[b];
      const Layer& l = layers[batch.layer];
      const int64_t per_segment = chunks_of(l);
      for (int64_t c = batch.begin; c < batch.end; ++c) {
        const int64_t within = c % per_segment * kChunk;
        const int64_t n = std::min(kChunk, l.width - within);
        const char* inputs[Sums::kInputs];
        gather(l, Sums::kInputs, c / per_segment * l.width + within, n, inputs);
        partials[batch.slot + c - batch.begin] = measure_chunk(chunk_table, l, inputs, n, gather);
      }
    }
  });
  const Partial<Sums>* p = partials.get();
  for (const Layer& l : layers) {
    const int64_t per_segment = chunks_of(l);
    for (int64_t s = 0; s < l.segments; ++s, p += per_segment) {
      const Partial<Sums> sum = merged(p, per_segment);
      for (int k = 0; k < Sums::kSums; ++k) *out++ = sum.sum[k];
      *out++ = sum.nonfinite;
      *out++ = static_cast<double>(l.width);
    }
  }
}
#define FASTFS_INSTANCE(name, Sums) template void measure<Sums>(const std::vector<Layer>&, double*, int);
FASTFS_MEASUREMENTS(FASTFS_INSTANCE)
#undef FASTFS_INSTANCE

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace fastfs::cpu
