#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "measure.h"

namespace fastfs::cpu {
namespace {

struct Choice {
  const Loops* loops;
  bool supported;
};

// Best last.
std::vector<Choice> choices() {
  std::vector<Choice> all{{&loops_generic(), true}};
#ifdef FASTFS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  all.push_back({&loops_avx2(), avx2});
  all.push_back({&loops_avx512(), avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")});
#endif
  return all;
}

const Loops& choose() {
  const char* wanted = std::getenv("FASTFS_CPU");
  const Loops* best = nullptr;
  std::string usable;
  for (const Choice& c : choices()) {
    if (!c.supported) continue;
    usable += std::string(usable.empty() ? "" : ", ") + c.loops->name;
    if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == c.loops->name) best = c.loops;
  }
  if (best == nullptr) {
    throw std::runtime_error("FASTFS_CPU=" + std::string(wanted) +
                             ": expected one of the instruction sets usable here (" + usable + ") or nothing");
  }
  return *best;
}

}  // namespace

const Loops& loops() {
  static const Loops& chosen = choose();
  return chosen;
}

std::vector<std::string> instruction_sets(bool usable) {
  std::vector<std::string> names;
  for (const Choice& c : choices()) {
    if (c.supported || !usable) names.emplace_back(c.loops->name);
  }
  return names;
}

std::string instruction_set() { return loops().name; }

}  // namespace fastfs::cpu
