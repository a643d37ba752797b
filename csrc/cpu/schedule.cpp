#include "../formulas/schedule.h"

#include <tuple>

#include "rowwise.h"

namespace fastgen::cpu {

namespace {

template <template <class> class Formula, int N, class... Scalars>
Tensor map_rows(const std::array<Tensor, N>& inputs, const Scalars&... scalars) {
  const Rows<N> rows(inputs);
  const auto arithmetic = rows.arithmetic(), dtype = rows.promoted();
  const Tensor out = rows.new_output(dtype);
  const std::array<std::optional<Tensor>, sizeof...(Scalars)> converted{row_scalars(scalars, arithmetic)...};
  with_arithmetic(arithmetic, [&](auto zero) {
    using T = decltype(zero);
    const auto formula = std::apply([](const auto&... t) { return Formula<T>{data_or_null<T>(t)...}; }, converted);
    rowwise<T>(formula, Groups::single(rows.count), rows, {out.mutable_data_ptr(), dtype});
  });
  return out;
}

}  // namespace

Tensor row_combination(const Tensor& x, const Tensor& a, const std::optional<Tensor>& y,
                       const std::optional<Tensor>& b) {
  if (!y) return map_rows<RowScaled, 1>({x}, a);
  return map_rows<RowCombination, 2>({x, *y}, a, b);
}

}  // namespace fastgen::cpu

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("row_combination", TORCH_BOX(&fastgen::cpu::row_combination)); }
