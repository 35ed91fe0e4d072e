// The rows of one tensor, and which of them a call keeps: what the row kernels are given, already checked.
//
// The first dimensions of the tensor, flattened row-major, number its rows; the others are the width of a row. The
// squares of a row are summed in chunks of kChunk elements, merged in index order: the cut depends on the width alone.
#pragma once

#include <cstdint>

#include "arithmetic.h"
#include "layers.h"
#include "strides.h"

namespace fastfs {

struct RowTensor {
  const char* data;
  DType dtype;
  int64_t rows;
  // One row as a layer of one segment: width, and the merged dimensions of the width if it has gaps. Without data.
  Layer row;
  // The dimensions that number the rows, merged where they allow it; strides in elements.
  int dims;
  int64_t shape[kMaxDims];
  int64_t stride[kMaxDims];
};

// Which rows to take, and where to put them.
struct RowRequest {
  const int64_t* index;  // `kept` row numbers, `index_stride` elements apart
  int64_t index_stride;
  int64_t kept;
  char* to;  // kept x width of dtype to_dtype, contiguous; null: squares alone
  DType to_dtype;
  double* squares;  // kept
};

constexpr int64_t chunks_of_row(int64_t width) { return width <= kChunk ? 1 : ceil_div(width, kChunk); }

// Fills in all of `x` but data and dtype. False if more than kMaxDims dimensions are left.
inline bool split_rows(RowTensor& x, int row_dims, int ndim, const int64_t* shape, const int64_t* strides) {
  x.row = Layer{};
  x.row.first = x.row.last = x.dtype;
  x.rows = x.row.segments = x.row.width = 1;
  for (int d = 0; d < ndim; ++d) (d < row_dims ? x.rows : x.row.width) *= shape[d];
  x.row.contiguous[0] = true;
  x.dims = 0;
  if (x.rows == 0 || x.row.width == 0) return true;
  Layer outer{};
  const int64_t* const inner_strides = strides + row_dims;
  if (!merge_dims(outer, 1, true, row_dims, shape, &strides)) return false;
  if (!merge_dims(x.row, 1, true, ndim - row_dims, shape + row_dims, &inner_strides)) return false;
  x.dims = outer.dims;
  for (int d = 0; d < outer.dims; ++d) {
    x.shape[d] = outer.shape[d];
    x.stride[d] = outer.stride[0][d];
  }
  return true;
}

// Where row `row` begins, in elements from x.data. T has dims, shape and stride as RowTensor does.
template <class T>
FASTFS_HD int64_t row_offset(const T& x, int64_t row) {
  int64_t offset = 0;
  for (int d = x.dims - 1; d > 0; --d) {
    const int64_t outer = row / x.shape[d];
    offset += (row - outer * x.shape[d]) * x.stride[d];
    row = outer;
  }
  return x.dims > 0 ? offset + row * x.stride[0] : 0;
}

// Must squares that were summed in float be summed again in double? So if one overflowed or is NaN, or if they are so
// small that float loses digits, or all of them, to underflow.
FASTFS_HD bool squares_need_double(double sum) { return !(sum - sum == 0.0) || sum < 0x1p-100; }

// One NaN for all: which of two NaNs an addition returns depends on the order that a compiler gives them.
FASTFS_HD double one_nan(double sum) { return sum == sum ? sum : __builtin_nan(""); }

}  // namespace fastfs
