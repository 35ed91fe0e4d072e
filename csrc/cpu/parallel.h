// Items of work on threads, each with scratch memory of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef FASTFS_X86
#include <xmmintrin.h>
#endif

#include "gather.h"

namespace fastfs::cpu {

constexpr int64_t kSerial = 1 << 15;  // elements: below, waking a second thread costs more than it saves

// The processor's default floating-point mode while it lives: results do not depend on torch.set_flush_denormal.
class DefaultFloatMode {
 public:
#ifdef FASTFS_X86
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatMode() { _mm_setcsr(saved_); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  unsigned saved_;
#endif
};

// Calls body(thread-local state, item) for every item in [0, items), on up to `threads` threads.
template <class Body>
void parallel(int64_t items, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  auto work = [&] {
    const DefaultFloatMode mode;
    Gather gather;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(gather, i);
  };
  threads = static_cast<int>(std::min<int64_t>(threads, items));
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      try {
        work();
      } catch (...) {  // no exception may leave the parallel region: kept, and thrown after it
#pragma omp critical
        error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  work();
}

}  // namespace fastfs::cpu
