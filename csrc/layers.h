// The input of the kernels: layers as pointers, dtypes, shapes and strides, already checked.
//
// A layer is a row-major sequence of `segments * width` elements. Every segment gets one row of sums: a whole layer is
// one segment, or with per_row each row (last dimension) is one. The CPU cuts a segment into chunks of kChunk elements,
// and these into groups of kGroupChunks chunks; cuda/policy.cuh has the cut of CUDA. The cut depends on the width and
// the size of elements only, and partial sums are merged in index order, so the result does not depend on threads,
// grid, neighbouring layers or alignment.
#pragma once

#include <cstdint>

namespace fastfs {

constexpr int64_t kChunk = 8192;      // elements
constexpr int64_t kGroupChunks = 64;  // chunks
constexpr int kMaxInputs = 4;
constexpr int kMaxCoefficients = 4;
constexpr int kMaxDims = 16;

enum class DType : uint8_t { f16, bf16, f32, f64 };

constexpr int64_t item_size(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

struct Layer {
  const char* data[kMaxInputs];
  DType first;  // dtype of all inputs but the last (before and after; gradient)
  DType last;   // dtype of the last input (backward; update)
  int64_t segments;
  int64_t width;                // elements per segment
  bool contiguous[kMaxInputs];  // row-major without gaps: element i lies at data + i * item_size
  // For inputs that are not contiguous: the dimensions, merged where all inputs allow it, strides in elements.
  int dims;
  int64_t shape[kMaxDims];
  int64_t stride[kMaxInputs][kMaxDims];
  double coefficients[kMaxCoefficients];  // if the measurement has some and they are in CPU memory
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t chunks_of(const Layer& l) { return ceil_div(l.width, kChunk); }             // per segment
constexpr int64_t groups_of(const Layer& l) { return ceil_div(chunks_of(l), kGroupChunks); }  // per segment

}  // namespace fastfs
