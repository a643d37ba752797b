// Runs one body compiled for several instruction sets: the best that this processor has, chosen once.
#pragma once

#include <cstdint>

namespace fastgen::cpu {

enum class Isa : int { baseline, avx2, avx512 };

// The best that there is; FASTGEN_CPU_CAPABILITY=baseline|avx2|avx512 lowers it, for tests and for reports of problems.
Isa chosen_isa();
const char* isa_name(Isa);

inline Isa isa() {
  static const Isa level = chosen_isa();
  return level;
}

// A job may say that the baseline will do for it: every instruction set is another copy to compile.
template <class Job>
constexpr bool baseline_only() {
  if constexpr (requires { Job::kBaselineOnly; }) return Job::kBaselineOnly;
  else return false;
}

template <class Body, class Job, class... Values>
void run_baseline(const Job& job, Values... values) {
  Body::run(job, values...);
}

#if defined(__x86_64__)
template <class Body, class Job, class... Values>
__attribute__((target("avx2,fma,bmi,bmi2,f16c"))) void run_avx2(const Job& job, Values... values) {
  Body::run(job, values...);
}

template <class Body, class Job, class... Values>
__attribute__((target("avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void
run_avx512(const Job& job, Values... values) {
  Body::run(job, values...);
}
#endif

// Calls Body::run(job, values...), which is to be always inlined. Each body is compiled once per instruction set: it is
// a loop over elements, and what surrounds such loops stays outside.
template <class Body, class Job, class... Values>
void run(const Job& job, Values... values) {
#if defined(__x86_64__)
  if constexpr (!baseline_only<Job>()) {
    switch (isa()) {
      case Isa::avx512: return run_avx512<Body>(job, values...);
      case Isa::avx2: return run_avx2<Body>(job, values...);
      default: break;
    }
  }
#endif
  run_baseline<Body>(job, values...);
}

}  // namespace fastgen::cpu
