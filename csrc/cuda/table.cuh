// The table of layers that a launch takes by value: no copy to the device, so CUDA graphs capture it.
//
//   work item   a chunk of a segment (block mode), or a whole short row (row mode)
//   entry       one layer; its items are first_item .. first_item of the next entry - 1, segment by segment
//
//   entry:      [ layer 0        ][ layer 1 ][ layer 2              ] ...
//   item:         0  1  2  3  4     5          6  7  8  9  10 11      items = 12
//   segment:      0  0  0  0  0     0          0  0  0  1  1  1       layer 2 has two segments of three chunks
//
// A table never straddles launches: partial results and tickets are indexed by the item of its launch.
#pragma once

#include <cstring>

#include "../layers.h"
#include "../measurements.h"

namespace fastfs::cuda {

// Bytes of kernel parameters: every driver takes 4 KB, those of CUDA 12.1 and later 32764 from sm_70 on.
constexpr int kSmallTable = 4096;
constexpr int kLargeTable = 32764;

struct Launch {
  int64_t items;
  double* out;                 // rows of Sums::kSums + 2
  double* partials;            // items x slots (segment_sums.cuh), if a segment has several chunks
  uint32_t* tickets;           // items, likewise
  const double* coefficients;  // rows for all layers, in device memory; null if they are in the entries
  int32_t entries;
  int32_t team;    // threads that sum an item together: all of a block (block mode), or a part of a warp (row mode)
  int32_t rounds;  // items that a team takes one after the other; one in block mode
  DType last;      // dtype of the last input
  DType first;     // dtype of the other inputs
};

FASTFS_HD int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
FASTFS_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Chunks of 2^bits elements in a segment. An empty one still has a chunk, which writes its row of zeros.
FASTFS_HD constexpr int64_t chunks_in(int64_t width, int bits) {
  return width == 0 ? 1 : (width + (int64_t{1} << bits) - 1) >> bits;
}

template <int kCount>
struct EntryCoefficients {
  double coefficient[kCount];
};
template <>
struct EntryCoefficients<0> {};

// Layers whose inputs are all contiguous.
template <int kInputs, int kBytes, int kCoefficients = 0>
struct DenseTable {
  static constexpr bool kStrided = false;
  struct Entry : EntryCoefficients<kCoefficients> {
    const char* data[kInputs];
    int64_t width, first_item, first_row;
  };
  static constexpr int kCapacity = (kBytes - static_cast<int>(sizeof(Launch))) / static_cast<int>(sizeof(Entry));
  Launch launch;
  Entry entry[kCapacity];

  FASTFS_HD int64_t first_item(int e) const { return entry[e].first_item; }
  FASTFS_HD int64_t width(int e) const { return entry[e].width; }
  FASTFS_HD int64_t first_row(int e) const { return entry[e].first_row; }
  FASTFS_HD double coefficient(int e, int i) const { return entry[e].coefficient[i]; }

  void clear() { launch.entries = 0; }
  // Adds a layer, or says that the table is full.
  bool add(const Layer& layer, int64_t item, int64_t row) {
    if (launch.entries == kCapacity) return false;
    Entry& e = entry[launch.entries++];
    for (int j = 0; j < kInputs; ++j) e.data[j] = layer.data[j];
    e.width = layer.width;
    e.first_item = item;
    e.first_row = row;
    if constexpr (kCoefficients > 0) {
      for (int i = 0; i < kCoefficients; ++i) e.coefficient[i] = layer.coefficients[i];
    }
    return true;
  }
};

// Layers of any strides, contiguous inputs among them. An entry has as many words as its dimensions need, of which a
// layer with contiguous inputs only has none:
//   data[kInputs], width, first_row, contiguous bits, dims, coefficients, shape[dims], stride[kInputs][dims]
template <int kInputs, int kBytes, int kCoefficients = 0>
struct StridedTable {
  static constexpr bool kStrided = true;
  static constexpr int kCapacity = kBytes / 64;
  static constexpr int kWords = (kBytes - static_cast<int>(sizeof(Launch)) - kCapacity * 12) / 8;
  Launch launch;
  int64_t first[kCapacity];
  int64_t word[kWords];
  int32_t at[kCapacity];

  FASTFS_HD int64_t first_item(int e) const { return first[e]; }
  FASTFS_HD int64_t width(int e) const { return word[at[e] + kInputs]; }
  FASTFS_HD int64_t first_row(int e) const { return word[at[e] + kInputs + 1]; }
  FASTFS_HD const char* data(int e, int j) const { return reinterpret_cast<const char*>(word[at[e] + j]); }
  FASTFS_HD bool contiguous(int e, int j) const { return word[at[e] + kInputs + 2] >> j & 1; }
  FASTFS_HD int dims(int e) const { return static_cast<int>(word[at[e] + kInputs + 3]); }
  FASTFS_HD double coefficient(int e, int i) const {
    double value;
    __builtin_memcpy(&value, &word[at[e] + kInputs + 4 + i], sizeof value);
    return value;
  }
  FASTFS_HD int64_t shape(int e, int d) const { return word[at[e] + kHead + d]; }
  FASTFS_HD int64_t stride(int e, int j, int d) const { return word[at[e] + kHead + (j + 1) * dims(e) + d]; }

  void clear() { launch.entries = 0; }
  bool add(const Layer& layer, int64_t item, int64_t row) {
    bool contiguous_all = true;
    for (int j = 0; j < kInputs; ++j) contiguous_all = contiguous_all && layer.contiguous[j];
    const int layer_dims = contiguous_all ? 0 : layer.dims;
    const int n = launch.entries;
    const int begin = n == 0 ? 0 : at[n - 1] + size(dims(n - 1));
    if (n == kCapacity || begin + size(layer_dims) > kWords) return false;
    first[n] = item;
    at[n] = begin;
    int64_t* w = word + begin;
    for (int j = 0; j < kInputs; ++j) *w++ = reinterpret_cast<int64_t>(layer.data[j]);
    *w++ = layer.width;
    *w++ = row;
    *w = 0;
    for (int j = 0; j < kInputs; ++j) *w |= static_cast<int64_t>(layer.contiguous[j]) << j;
    *++w = layer_dims;
    ++w;
    if constexpr (kCoefficients > 0) {
      std::memcpy(w, layer.coefficients, kCoefficients * sizeof *w);
      w += kCoefficients;
    }
    for (int d = 0; d < layer_dims; ++d) *w++ = layer.shape[d];
    for (int j = 0; j < kInputs; ++j) {
      for (int d = 0; d < layer_dims; ++d) *w++ = layer.contiguous[j] ? 0 : layer.stride[j][d];
    }
    ++launch.entries;
    return true;
  }

 private:
  static constexpr int kHead = kInputs + 4 + kCoefficients;
  static constexpr int size(int dims) { return kHead + (kInputs + 1) * dims; }
  static_assert(kHead + (kInputs + 1) * kMaxDims <= kWords, "a layer of most dimensions must fit");
};

// The part of a segment that one item is: elements begin .. begin + count - 1 of segment `segment`.
struct Item {
  int entry;
  int64_t segment, chunks, chunk;
  int64_t begin;  // first element, counted from the start of the layer
  int count;
};

// The entry of an item, which is `entry` or a later one.
template <class Table>
FASTFS_HD int entry_of(const Table& table, int64_t item, int entry) {
  int low = entry, high = table.launch.entries;  // first_item(low) <= item < first_item(high)
  if (low + 1 < high && item >= table.first_item(low + 1)) {
    ++low;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (table.first_item(middle) <= item) {
        low = middle;
      } else {
        high = middle;
      }
    }
  }
  return low;
}

// What an item of an entry is, in segments that are cut into chunks of 2^bits elements.
template <class Table>
FASTFS_HD Item item_at(const Table& table, int64_t item, int entry, int bits) {
  const int64_t width = table.width(entry), local = item - table.first_item(entry), chunk = int64_t{1} << bits;
  Item found;
  found.entry = entry;
  found.chunks = chunks_in(width, bits);
  found.segment = found.chunks == 1 ? local : local < found.chunks ? 0 : local / found.chunks;
  found.chunk = local - found.segment * found.chunks;
  found.begin = found.segment * width + (found.chunk << bits);
  found.count = static_cast<int>(min64(chunk, width - (found.chunk << bits)));
  return found;
}

}  // namespace fastfs::cuda
