// A chunk of a layer as contiguous inputs. Inputs that are not contiguous are copied, a chunk at a time, into scratch
// memory that stays in the cache: no tensor is ever copied whole. There is a second such memory for chunks in a wider
// dtype.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#include "../layers.h"

namespace fastfs::cpu {

class Gather {
 public:
  // Points inputs[i] at `n` <= kChunk elements of the layer from row-major element `start` on.
  void operator()(const Layer& l, int count, int64_t start, int64_t n, const char** inputs) {
    for (int i = 0; i < count; ++i) {
      const int64_t size = item_size(i + 1 < count ? l.first : l.last);
      if (l.contiguous[i]) {
        inputs[i] = l.data[i] + start * size;
      } else {
        inputs[i] = strided(l, i, start, n, size);
      }
    }
  }
  // Memory for a chunk of doubles of one input.
  char* wide(int input) { return scratch(wide_, input); }

 private:
  static constexpr int64_t kBytes = kChunk * 8 + 64;
  static char* scratch(std::unique_ptr<char[]>& memory, int input) {
    if (!memory) memory.reset(new char[kMaxInputs * kBytes]);
    return memory.get() + input * kBytes;
  }

  const char* strided(const Layer& l, int input, int64_t start, int64_t n, int64_t size) {
    const int64_t* stride = l.stride[input];
    const int inner = l.dims - 1;
    int64_t index[kMaxDims], offset = 0, rest = start;
    for (int d = inner; d >= 0; --d) {
      index[d] = rest % l.shape[d];
      rest /= l.shape[d];
      offset += index[d] * stride[d];
    }
    if (stride[inner] == 1 && index[inner] + n <= l.shape[inner]) return l.data[input] + offset * size;  // in one row

    char* const begin = scratch(scratch_, input);
    char* to = begin;
    for (int64_t left = n; left > 0;) {
      const int64_t length = l.shape[inner] - index[inner] < left ? l.shape[inner] - index[inner] : left;
      copy(to, l.data[input] + offset * size, length, stride[inner], size);
      to += length * size;
      left -= length;
      offset += length * stride[inner];
      index[inner] += length;
      for (int d = inner; d > 0 && index[d] == l.shape[d]; --d) {
        offset += stride[d - 1] - index[d] * stride[d];
        index[d] = 0;
        ++index[d - 1];
      }
    }
    return begin;
  }

  template <class T>
  static void copy_items(char* to, const char* from, int64_t n, int64_t stride) {
    for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * sizeof(T), from + i * stride * sizeof(T), sizeof(T));
  }
  static void copy(char* to, const char* from, int64_t n, int64_t stride, int64_t size) {
    if (stride == 1) {
      std::memcpy(to, from, static_cast<size_t>(n * size));
    } else if (size == 2) {
      copy_items<uint16_t>(to, from, n, stride);
    } else if (size == 4) {
      copy_items<uint32_t>(to, from, n, stride);
    } else {
      copy_items<uint64_t>(to, from, n, stride);
    }
  }

  std::unique_ptr<char[]> scratch_, wide_;
};

}  // namespace fastfs::cpu
