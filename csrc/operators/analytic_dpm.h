// The operator of the family analytic_dpm, for any device (csrc/operators/device.h says what that is).
#pragma once

#include "../formulas/analytic_dpm.h"
#include "device.h"

namespace fastgen {

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
