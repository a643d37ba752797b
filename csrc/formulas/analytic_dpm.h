// The moments of Analytic-DPM (arXiv 2201.06503).
#pragma once

#include "formula.h"

namespace fastgen {

// out[i] = scale * sum_D p^2
template <class T>
struct MeanSquare {
  static constexpr int kStreams = 1, kSums = 1, kMapStreams = 0;
  struct Row {
    T scale;
  };
  T scale;  // 1/D
  T* out;

  FASTGEN_HD Row row(int64_t, int64_t) const { return {scale}; }
  FASTGEN_HD void accumulate(const Row&, const T* v, T* sums) const { sums[0] += v[0] * v[0]; }
  FASTGEN_HD T epilogue(int64_t group, const T* sums) const { return out[group] = sums[0]; }
};

}  // namespace fastgen
