// What every backward does to a gradient that its forward has written.
#pragma once

#include "runtime/device.h"

namespace fastgen {

// out = scale * v, with one scale for all rows: what a backward pass does to a gradient that the forward has written.
template <class T>
struct Scaled {
  static constexpr int kStreams = 1, kSums = 0, kMapStreams = 1;
  struct Row {};
  const T* scale;

  FASTGEN_HD bool idle() const { return *scale == T(1); }
  FASTGEN_HD Row row(int64_t, int64_t) const { return {}; }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row&, T) const { return *scale; }
  FASTGEN_HD T map(const Row&, T coefficient, const T* v) const { return coefficient * v[0]; }
};

template <class Device>
void scale_gradient_(const Tensor& grad, const Tensor& scale) {
  const Rows<1> rows({grad});
  const auto dtype = rows.arithmetic();
  const auto factor = row_scalars(scale, dtype);
  with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Scaled<T> formula{data_or_null<T>(factor)};
    Device::template rowwise<T>(formula, Groups::single(rows.count), rows,
                                {grad.mutable_data_ptr(), grad.scalar_type()});
  });
}

template <class Device>
void register_gradient(torch::stable::detail::StableLibrary& m) {
  m.impl("scale_gradient_", TORCH_BOX(&scale_gradient_<Device>));
}

}  // namespace fastgen
