// The barriers and copies of shim_bulk.h. Part of the runtime: included at the end of shim_rt.cpp.

namespace shim {
namespace {
struct Barrier {  // in the eight bytes that a kernel gives
  int32_t bytes;  // announced and not yet there
  uint8_t count, pending, phase;
};
static_assert(sizeof(Barrier) <= sizeof(uint64_t), "a barrier has eight bytes");
struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  uint64_t* barrier;
};
// Started and not yet there, all of the block that runs. An array: the sanitizers would see a vector grow.
thread_local Copy copies[64];
thread_local size_t started;

Barrier& at(uint64_t* barrier) { return *reinterpret_cast<Barrier*>(barrier); }
void advance(Barrier& b) {
  if (b.pending > 0 || b.bytes > 0) return;
  b.phase ^= 1;
  b.pending = b.count;
  g->progress++;
}
}  // namespace

void bulk_init(uint64_t* barrier, unsigned count) {
  at(barrier) = Barrier{0, static_cast<uint8_t>(count), static_cast<uint8_t>(count), 0};
}
void bulk_arrive(uint64_t* barrier, unsigned bytes) {
  Barrier& b = at(barrier);
  if (b.pending == 0) die("more arrivals at a barrier than it expects");
  TSAN(__tsan_release(barrier);)
  b.bytes += static_cast<int32_t>(bytes);
  b.pending--;
  advance(b);
}
void bulk_load(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
  if (bits % 16 != 0) die("bulk copy: addresses and size must be multiples of 16");
  memset(to, 0x3f, bytes);
  TSAN(__tsan_release(barrier);)
  if (started == sizeof copies / sizeof *copies) die("too many bulk copies under way");
  copies[started++] = Copy{to, from, bytes, barrier};
}
void bulk_wait(uint64_t* barrier, unsigned parity, const char* where) {
  cur->where = where;
  Barrier& b = at(barrier);
  if ((b.phase & 1) == parity) {  // the others get as far as they can before anything arrives
    g->progress++;
    to_main();
  }
  while ((b.phase & 1) == parity) {
    const uint64_t before = g->progress;
    bool found = false;
    for (size_t i = 0; i < started;) {
      if (copies[i].barrier != barrier) {
        ++i;
        continue;
      }
      const Copy c = copies[i];
      copies[i] = copies[--started];
      TSAN(__tsan_acquire(barrier);)
      memcpy(c.to, c.from, c.bytes);
      TSAN(__tsan_release(barrier);)
      b.bytes -= static_cast<int32_t>(c.bytes);
      found = true;
    }
    if (found) advance(b);
    if (!found || g->progress == before) to_main();
  }
  TSAN(__tsan_acquire(barrier);)
}
}  // namespace shim
