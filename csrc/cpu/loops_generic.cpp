// The loops for any processor.
#include "vectors_generic.h"
//
#include "loops.h"

namespace fastfs::cpu {
namespace {
constexpr int kUnroll = 1, kRowUnroll = 1;
#include "loops_impl.h"
#include "row_loops_impl.h"
}  // namespace

const Loops& loops_generic() {
  static constexpr Loops loops{"generic", kSumLoops, kWidening, kRowLoops};
  return loops;
}
}  // namespace fastfs::cpu
