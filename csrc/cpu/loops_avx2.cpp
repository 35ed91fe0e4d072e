// The loops for AVX2 with FMA and F16C.
#include "vectors_avx2.h"
//
#include "loops.h"

namespace fastfs::cpu {
namespace {
constexpr int kUnroll = 4, kRowUnroll = 4;
#include "loops_impl.h"
#include "row_loops_impl.h"
}  // namespace

const Loops& loops_avx2() {
  static constexpr Loops loops{"avx2", kSumLoops, kWidening, kRowLoops};
  return loops;
}
}  // namespace fastfs::cpu
