// What every backward does to a gradient that its forward has written (csrc/operators/device.h: Device).
#pragma once

#include "device.h"

namespace fastgen {

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
