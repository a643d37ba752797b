// The operators of the family schedule, for any device (csrc/operators/device.h says what that is).
#pragma once

#include <tuple>

#include "../formulas/schedule.h"
#include "device.h"

namespace fastgen {

template <class Device, template <class> class Formula, int N, class... Scalars>
Tensor map_rows(const std::array<Tensor, N>& inputs, const Scalars&... scalars) {
  const Rows<N> rows(inputs);
  const auto arithmetic = rows.arithmetic(), dtype = rows.promoted();
  const Tensor out = Device::new_output(rows, dtype);
  const std::array<std::optional<Tensor>, sizeof...(Scalars)> converted{row_scalars(scalars, arithmetic)...};
  with_arithmetic(arithmetic, [&](auto zero) {
    using T = decltype(zero);
    const auto formula = std::apply([](const auto&... t) { return Formula<T>{data_or_null<T>(t)...}; }, converted);
    Device::template rowwise<T>(formula, Groups::single(rows.count), rows, {out.mutable_data_ptr(), dtype});
  });
  return out;
}

template <class Device>
Tensor row_combination(const Tensor& x, const Tensor& a, const std::optional<Tensor>& y,
                       const std::optional<Tensor>& b) {
  if (!y) return map_rows<Device, RowScaled, 1>({x}, a);
  return map_rows<Device, RowCombination, 2>({x, *y}, a, b);
}

template <class Device>
void register_schedule(torch::stable::detail::StableLibrary& m) {
  m.impl("row_combination", TORCH_BOX(&row_combination<Device>));
}

}  // namespace fastgen
