// Chooses the instruction set of the CPU kernels, once per process.
#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if FASTMETA_X86
#include <cpuid.h>
#endif

namespace fastmeta::cpu {
namespace {

struct Choice {
  const Isa* table;
  bool supported;
};

const char* asked() {
  const char* name = std::getenv("FASTMETA_CPU_ISA");
  return name && *name ? name : nullptr;
}

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
  if (const char* name = asked()) {
    std::string supported;
    for (const Choice& choice : choices) {
      if (!choice.supported) continue;
      if (std::string(name) == choice.table->name) return *choice.table;
      supported += supported.empty() ? choice.table->name : std::string(", ") + choice.table->name;
    }
    throw std::runtime_error("FASTMETA_CPU_ISA is '" + std::string(name) +
                             "'; this processor and build support: " + supported);
  }
  for (const Choice& choice : choices)
    if (choice.supported) return *choice.table;
  return kBaseline;
}

#if FASTMETA_X86
// AMD's family 19h (Zen 4 and its kin) has AVX-512 on arithmetic units of 256 bits.
bool halves_avx512() {
  unsigned version = 0, features = 0, unused = 0, vendor[4] = {};
  if (!__get_cpuid(0, &unused, &vendor[0], &vendor[2], &vendor[1])) return false;
  if (std::string(reinterpret_cast<const char*>(vendor)) != "AuthenticAMD") return false;
  __get_cpuid(1, &version, &unused, &unused, &features);
  return ((version >> 8) & 0xf) + ((version >> 20) & 0xff) == 0x19;
}

// Numbers of all matrices, in vectors of `lanes`: rows padded, and columns.
int64_t padded_work(const int64_t* widths, int64_t layers, int64_t lanes) {
  const auto up = [&](int64_t n) { return (n + lanes - 1) / lanes * lanes; };
  int64_t work = 0;
  for (int64_t l = 0; l < layers; ++l) work += widths[l] * up(widths[l + 1]) + up(widths[l]) * widths[l + 1];
  return work;
}
#endif

}  // namespace

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

const Isa& isa_for(const int64_t* widths, int64_t layers, int64_t number_bytes) {
  const Isa& chosen = isa();
#if FASTMETA_X86
  static const bool halves = &chosen == &kAvx512 && !asked() && halves_avx512();
  // where both pad alike AVX-512 is faster by a tenth: it has twice the registers
  if (halves && 10 * padded_work(widths, layers, 64 / number_bytes) > 11 * padded_work(widths, layers, 32 / number_bytes))
    return kAvx2;
#endif
  return chosen;
}

}  // namespace fastmeta::cpu
