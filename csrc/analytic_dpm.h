// The moments of Analytic-DPM (arXiv 2201.06503).
#pragma once

#include "runtime/device.h"

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

template <class Device>
Tensor mean_square(const Tensor& pred) {
  const Rows<1> rows({pred});
  const auto dtype = rows.arithmetic();
  const Tensor out = new_vector(pred, rows.count, dtype);
  with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    const MeanSquare<T> formula{T(1.0 / static_cast<double>(std::max<int64_t>(rows.size, 1))), mutable_data<T>(out)};
    Device::template rowwise<T>(formula, Groups::single(rows.count), rows);
  });
  return out;
}

template <class Device>
void register_analytic_dpm(torch::stable::detail::StableLibrary& m) {
  m.impl("mean_square", TORCH_BOX(&mean_square<Device>));
}

}  // namespace fastgen
