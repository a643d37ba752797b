// The forward process and conversions between predictions: per-row linear combinations.
#pragma once

#include <tuple>

#include "runtime/device.h"

namespace fastgen {

// out = a_i * x + b_i * y
template <class T>
struct RowCombination {
  static constexpr int kStreams = 2, kSums = 0, kMapStreams = 2;
  struct Row {
    T a, b;
  };
  const T* a;
  const T* b;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return {a[row], b[row]}; }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row&, T) const { return T(0); }
  FASTGEN_HD T map(const Row& row, T, const T* v) const { return row.a * v[0] + row.b * v[1]; }
};

// out = a_i * x
template <class T>
struct RowScaled {
  static constexpr int kStreams = 1, kSums = 0, kMapStreams = 1;
  struct Row {
    T a;
  };
  const T* a;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return {a[row]}; }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row& row, T) const { return row.a; }
  FASTGEN_HD T map(const Row&, T coefficient, const T* v) const { return coefficient * v[0]; }
};

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
