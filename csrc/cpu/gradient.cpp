#include "rowwise.h"

namespace fastgen::cpu {

void scale_gradient_(const Tensor& grad, const Tensor& scale) {
  const Rows<1> rows({grad});
  const auto dtype = rows.arithmetic();
  const auto factor = row_scalars(scale, dtype);
  with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Scaled<T> formula{data_or_null<T>(factor)};
    if (*formula.scale != T(1))
      rowwise<T>(formula, Groups::single(rows.count), rows, {grad.mutable_data_ptr(), grad.scalar_type()});
  });
}

}  // namespace fastgen::cpu

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { m.impl("scale_gradient_", TORCH_BOX(&fastgen::cpu::scale_gradient_)); }
