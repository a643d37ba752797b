#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace fastgen::cpu {

namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

}  // namespace

const char* isa_name(Isa level) {
  return level == Isa::avx512 ? "avx512" : level == Isa::avx2 ? "avx2" : "baseline";
}

Isa chosen_isa() {
  const Isa limit = best();
  const char* wanted = std::getenv("FASTGEN_CPU_CAPABILITY");
  if (wanted != nullptr)
    for (Isa level : {Isa::baseline, Isa::avx2, Isa::avx512})
      if (std::strcmp(wanted, isa_name(level)) == 0 && level <= limit) return level;
  return limit;
}

}  // namespace fastgen::cpu
