// What a variant is called through: feature_stats of contiguous inputs of one dtype, and the streaming read. Plain C,
// for ctypes. The device is the first one, whose context the caller has made current.
#include <algorithm>
#include <cstdio>
#include <exception>

#include "../bench/stream_read.cuh"
#include "submit.cuh"

namespace {

using namespace fastfs;
using namespace fastfs::cuda;

// Layers as the caller gives them: three pointers each, and how many segments of which width.
struct Layers {
  std::vector<Layer> layers;
  std::vector<uint8_t> kinds;

  Layers(const void* const* data, const int64_t* widths, const int64_t* segments, int64_t count, DType dtype)
      : layers(static_cast<size_t>(count)), kinds(static_cast<size_t>(count)) {
    for (int64_t i = 0; i < count; ++i) {
      Layer& layer = layers[i];
      layer = Layer{};
      layer.first = layer.last = dtype;
      layer.width = widths[i];
      layer.segments = segments[i];
      for (int j = 0; j < FeatureSums::kInputs; ++j) {
        layer.data[j] = static_cast<const char*>(data[FeatureSums::kInputs * i + j]);
        layer.contiguous[j] = true;
      }
      kinds[i] = static_cast<uint8_t>(kind_of(layer, FeatureSums::kInputs).index());
    }
  }
};

// Runs `call`; what it throws becomes a text and the result 1.
template <class Call>
int guarded(char* error, int64_t size, Call call) {
  try {
    call();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, static_cast<size_t>(size), "%s", e.what());
    return 1;
  }
}

template <class F>
int sums(DType dtype, const void* const* data, const int64_t* widths, const int64_t* segments, int64_t count,
         double* out, double* partials, uint32_t* tickets, void* stream, char* error, int64_t size) {
  return guarded(error, size, [&] {
    using Small = DenseTable<FeatureSums::kInputs, kSmallTable>;
    using Large = DenseTable<FeatureSums::kInputs, kLargeTable>;
    const Layers given(data, widths, segments, count, dtype);
    const Job job{given.layers, given.kinds, nullptr, out, partials, tickets, true, stream};
    for (const int team : {8, 16, 32, Policies::Order::kThreads}) {
      const Kind kind{dtype, dtype, false, team};
      const auto layers = std::count(given.kinds.begin(), given.kinds.end(), kind.index());
      if (layers > Small::kCapacity) {
        submit_tables<FeatureSums, F, F, Large>(job, kind);
      } else if (layers > 0) {
        submit_tables<FeatureSums, F, F, Small>(job, kind);
      }
    }
  });
}

}  // namespace

extern "C" {

// Chunks of a segment, and partial sums of one: what the caller needs to size `partials` (chunks x slots doubles) and
// `tickets` (chunks zeros), where chunks are those of all segments together.
int64_t variant_chunks(int64_t width, int64_t itemsize) {
  return chunks_in(width, chunk_bits<Policies::Order>(itemsize, width));
}
int64_t variant_slots() { return kSlots<FeatureSums>; }

// data: 3 pointers a layer. out: a row of 9 doubles a segment. Returns 0, or 1 with a text in `error`.
#define VARIANT_SUMS(name, F, dtype)                                                                            \
  int name(const void* const* data, const int64_t* widths, const int64_t* segments, int64_t count, double* out, \
           double* partials, uint32_t* tickets, void* stream, char* error, int64_t size) {                      \
    return sums<F>(dtype, data, widths, segments, count, out, partials, tickets, stream, error, size);          \
  }
VARIANT_SUMS(variant_bf16, BF16, DType::bf16)
VARIANT_SUMS(variant_f16, F16, DType::f16)
VARIANT_SUMS(variant_f32, F32, DType::f32)
#undef VARIANT_SUMS

// Reads the inputs of the same layers and nothing else; `itemsize` is 2 or 4. One word goes to `sink`.
int variant_read(const void* const* data, const int64_t* widths, const int64_t* segments, int64_t count, int itemsize,
                 double* sink, int multiprocessors, void* stream, char* error, int64_t size) {
  return guarded(error, size, [&] {
    const Layers given(data, widths, segments, count, itemsize == 2 ? DType::bf16 : DType::f32);
    submit_reads(given.layers, FeatureSums::kInputs, sink, multiprocessors, architecture(0), true, stream);
  });
}
}
