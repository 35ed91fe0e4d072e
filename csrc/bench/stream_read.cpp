#include "stream_read.h"

#include <algorithm>
#include <atomic>
#include <string>

#include "../cpu/measure.h"
#include "../cpu/parallel.h"

namespace fastfs::bench {
namespace {

// Bytes ahead: a read of one stream is fastest with a longer distance than that of the measurements.
constexpr int64_t kPrefetch = 16384;

// In the compiler's own vectors, which it maps to the registers of the caller's instruction set.
inline __attribute__((always_inline)) uint64_t read_lines(const char* data, int64_t bytes) {
  typedef uint64_t Line __attribute__((vector_size(64)));  // of the cache
  constexpr int kLines = 8;
  Line mixed[kLines] = {};
  int64_t i = 0;
  for (; i + kLines * 64 <= bytes; i += kLines * 64) {
#pragma GCC unroll 8
    for (int k = 0; k < kLines; ++k) {
      const char* p = data + i + k * 64;
      __builtin_prefetch(p + kPrefetch);
      Line line;
      __builtin_memcpy(&line, p, sizeof line);
      mixed[k] ^= line;
    }
  }
  for (int k = 1; k < kLines; ++k) mixed[0] ^= mixed[k];
  uint64_t result = 0;
  for (int k = 0; k < 8; ++k) result += mixed[0][k];
  for (; i < bytes; ++i) result += static_cast<unsigned char>(data[i]);
  return result;
}

using Read = uint64_t (*)(const char* data, int64_t bytes);

uint64_t read_generic(const char* data, int64_t bytes) { return read_lines(data, bytes); }
#ifdef FASTFS_X86
__attribute__((target("avx2"))) uint64_t read_avx2(const char* data, int64_t bytes) { return read_lines(data, bytes); }
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) uint64_t read_avx512(const char* data, int64_t bytes) {
  return read_lines(data, bytes);
}
#endif

// With the registers that the measurements use.
Read choose_read() {
#ifdef FASTFS_X86
  const std::string name = cpu::instruction_set();
  if (name == "avx512") return &read_avx512;
  if (name == "avx2") return &read_avx2;
#endif
  return &read_generic;
}

}  // namespace

uint64_t stream_read_cpu(const std::vector<Layer>& layers, int inputs, int threads) {
  constexpr int64_t kPiece = 1 << 20;  // bytes
  struct Piece {
    const char* data;
    int64_t bytes;
  };
  std::vector<Piece> pieces;
  int64_t elements = 0;
  for (const Layer& l : layers) {
    for (int i = 0; i < inputs; ++i) {
      elements += l.segments * l.width;
      const int64_t bytes = l.segments * l.width * item_size(i + 1 < inputs ? l.first : l.last);
      for (int64_t b = 0; b < bytes; b += kPiece) pieces.push_back({l.data[i] + b, std::min(kPiece, bytes - b)});
    }
  }
  const Read read = choose_read();
  std::atomic<uint64_t> all{0};
  cpu::parallel(static_cast<int64_t>(pieces.size()), elements < cpu::kSerial ? 1 : threads,
                [&](cpu::Gather&, int64_t i) { all += read(pieces[i].data, pieces[i].bytes); });
  return all;
}

}  // namespace fastfs::bench
