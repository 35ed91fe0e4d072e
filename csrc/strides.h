// From the shape and strides of a layer's tensors to the few dimensions that its kernel walks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layers.h"

namespace fastfs {

// Fills in dims, shape, stride and contiguous of a layer that has a non-contiguous input; strides in elements. Sums do
// not depend on the order of elements, so dimensions go by stride, outermost first: inputs that share a permuted layout
// (transposed, channels-last) become contiguous. With per_row the last dimension stays the last and the rows keep their
// order. False if more than kMaxDims dimensions are left.
inline bool merge_dims(Layer& l, int inputs, bool per_row, int ndim, const int64_t* shape,
                       const int64_t* const* strides) {
  std::vector<int> order;
  for (int d = 0; d < ndim; ++d) {
    if (shape[d] != 1) order.push_back(d);
  }
  auto widest = [&](int d) {
    int64_t s = 0;
    for (int i = 0; i < inputs; ++i) s = std::max(s, strides[i][d]);
    return s;
  };
  if (!per_row) std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return widest(a) > widest(b); });
  l.dims = 0;
  for (const int d : order) {
    const int last = l.dims - 1;
    bool merges = l.dims > 0;
    for (int i = 0; i < inputs && merges; ++i) merges = l.stride[i][last] == strides[i][d] * shape[d];
    if (!merges && l.dims == kMaxDims) return false;
    const int into = merges ? last : l.dims++;
    l.shape[into] = merges ? l.shape[into] * shape[d] : shape[d];
    for (int i = 0; i < inputs; ++i) l.stride[i][into] = strides[i][d];
  }
  for (int i = 0; i < inputs; ++i) {
    int64_t expected = 1;
    l.contiguous[i] = true;
    for (int d = l.dims - 1; d >= 0; --d) {
      l.contiguous[i] = l.contiguous[i] && l.stride[i][d] == expected;
      expected *= l.shape[d];
    }
  }
  return true;
}

}  // namespace fastfs
