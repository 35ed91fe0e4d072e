// The loops for AVX-512.
#include "vectors_avx512.h"
//
#include "loops.h"

namespace fastfs::cpu {
namespace {
constexpr int kUnroll = 4, kRowUnroll = 16;
#include "loops_impl.h"
#include "row_loops_impl.h"
}  // namespace

const Loops& loops_avx512() {
  static constexpr Loops loops{"avx512", kSumLoops, kWidening, kRowLoops};
  return loops;
}
}  // namespace fastfs::cpu
