// Runs one body compiled for several instruction sets: the best that this processor has, chosen once.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <type_traits>

namespace fastgen::cpu {

enum class Isa : int { baseline, avx2, avx512 };

// FASTGEN_CPU_CAPABILITY=baseline|avx2|avx512 lowers it, for tests and for reports of problems.
Isa isa();
const char* isa_name(Isa);

// A job may say that the baseline will do for it: every instruction set is another copy to compile.
template <class Job>
constexpr bool baseline_only() {
  if constexpr (requires { Job::kBaselineOnly; }) return Job::kBaselineOnly;
  else return false;
}

template <class Body, class Job>
void run_baseline(const Job& job, double* scratch, int64_t begin, int64_t end) {
  Body::run(job, scratch, begin, end);
}

#if defined(__x86_64__)
template <class Body, class Job>
__attribute__((target("avx2,fma,bmi,bmi2,f16c"))) void run_avx2(const Job& job, double* scratch, int64_t begin,
                                                                int64_t end) {
  Body::run(job, scratch, begin, end);
}

template <class Body, class Job>
__attribute__((target("avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void
run_avx512(const Job& job, double* scratch, int64_t begin, int64_t end) {
  Body::run(job, scratch, begin, end);
}
#endif

template <class Body, class Job>
void run(const Job& job, double* scratch, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if constexpr (!baseline_only<Job>()) {
    switch (isa()) {
      case Isa::avx512: return run_avx512<Body>(job, scratch, begin, end);
      case Isa::avx2: return run_avx2<Body>(job, scratch, begin, end);
      default: break;
    }
  }
#endif
  run_baseline<Body>(job, scratch, begin, end);
}

template <class Body, class Job>
void serial(const Job& job, int64_t count) {
  run<Body>(job, nullptr, 0, count);
}

template <class Body, class Job>
void parallel(const Job& job, double* scratch, int64_t count) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { run<Body>(job, scratch, begin, end); });
}

}  // namespace fastgen::cpu
