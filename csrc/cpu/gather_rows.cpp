#include "gather_rows.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "parallel.h"

namespace fastfs::cpu {
namespace {

constexpr int64_t kAhead = 2048;  // bytes of the next row to prefetch

void check_index(const RowTensor& x, const RowRequest& q) {
  for (int64_t i = 0; i < q.kept; ++i) {
    const int64_t row = q.index[i * q.index_stride];
    if (row < 0 || row >= x.rows) {
      throw std::out_of_range("rows[" + std::to_string(i) + "] is " + std::to_string(row) +
                              ", expected the number of one of the " + std::to_string(x.rows) +
                              " rows of x: at least 0 and less than " + std::to_string(x.rows));
    }
  }
}

// Sum of n partials in a fixed order, pairwise.
double merged(const double* p, int64_t n) {
  if (n > kGroupChunks) {
    const int64_t left = ceil_div(ceil_div(n, kGroupChunks), 2) * kGroupChunks;
    return merged(p, left) + merged(p + left, n - left);
  }
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += p[i];
  return sum;
}

}  // namespace

void gather_rows(const RowTensor& x, const RowRequest& q, int threads) {
  check_index(x, q);
  const RowLoops& table = loops().rows;
  const int from = static_cast<int>(x.dtype);
  const RowFunction take = q.to != nullptr ? table.copy[from][static_cast<int>(q.to_dtype)] : table.squares[from];
  const int64_t width = x.row.width, size = item_size(x.dtype), to_size = item_size(q.to_dtype);
  if (width == 0 || q.kept == 0) return std::fill_n(q.squares, q.kept, 0.0), void();

  const int64_t chunks = chunks_of_row(width), items = q.kept * chunks, elements = q.kept * width;
  std::unique_ptr<double[]> partials;
  if (chunks > 1) partials.reset(new double[static_cast<size_t>(items)]);
  double* const sums = chunks > 1 ? partials.get() : q.squares;
  const int64_t grain = std::clamp(elements / (int64_t{8} * threads), kChunk, 32 * kChunk);
  const int64_t each = std::max<int64_t>(grain / std::min(width, kChunk), 1);  // items of a task
  const auto row_at = [&](int64_t kept) { return x.data + row_offset(x, q.index[kept * q.index_stride]) * size; };

  parallel(ceil_div(items, each), elements < kSerial ? 1 : threads, [&](Gather& gather, int64_t task) {
    Layer row = x.row;
    for (int64_t item = task * each; item < std::min(items, (task + 1) * each); ++item) {
      const int64_t kept = item / chunks, begin = (item - kept * chunks) * kChunk;
      const int64_t n = std::min(kChunk, width - begin);
      row.data[0] = row_at(kept);
      if (row.contiguous[0] && begin + n == width && kept + 1 < q.kept) {
        const char* const next = row_at(kept + 1);
        for (int64_t b = 0; b < std::min(kAhead, width * size); b += 64) __builtin_prefetch(next + b);
      }
      const char* input;
      gather(row, 1, begin, n, &input);
      sums[item] = take(input, q.to != nullptr ? q.to + (kept * width + begin) * to_size : nullptr, n);
    }
  });
  if (chunks > 1) {
    for (int64_t i = 0; i < q.kept; ++i) q.squares[i] = merged(sums + i * chunks, chunks);
  }
}

}  // namespace fastfs::cpu
