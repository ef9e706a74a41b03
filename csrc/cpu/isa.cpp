// Chooses the instruction set of the CPU kernels, once per process.
#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastmeta::cpu {
namespace {

struct Choice {
  const Isa* table;
  bool supported;
};

const Isa& choose() {
#if FASTMETA_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  const Choice choices[] = {{&kAvx512, avx512}, {&kAvx2, avx2}, {&kBaseline, true}};
#else
  const Choice choices[] = {{&kBaseline, true}};
#endif
  const char* asked = std::getenv("FASTMETA_CPU_ISA");
  if (asked && *asked) {
    std::string supported;
    for (const Choice& choice : choices) {
      if (!choice.supported) continue;
      if (std::string(asked) == choice.table->name) return *choice.table;
      supported += supported.empty() ? choice.table->name : std::string(", ") + choice.table->name;
    }
    throw std::runtime_error("FASTMETA_CPU_ISA is '" + std::string(asked) +
                             "'; this processor and build support: " + supported);
  }
  for (const Choice& choice : choices)
    if (choice.supported) return *choice.table;
  return kBaseline;
}

}  // namespace

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace fastmeta::cpu
