// The operators of the family score_distillation, for any device (csrc/operators/device.h says what that is).
#pragma once

#include <tuple>

#include "../formulas/score_distillation.h"
#include "device.h"
#include "options.h"

namespace fastgen {

namespace distillation {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, coefficients, stats, grad

template <class F>
void with_flag(bool flag, const F& f) {
  if (flag) f(std::true_type{});
  else f(std::false_type{});
}

// Fewer kernels to build: where there is a gate (rare), guidance is always compiled in, with the conditional prediction
// in the place of a missing unconditional one. c + s (c - c) = c.
template <class F>
void with_streams(bool uncond, bool gate, const F& f) {
  if (gate) f(std::true_type{}, std::true_type{});
  else if (uncond) f(std::true_type{}, std::false_type{});
  else f(std::false_type{}, std::false_type{});
}

// The same for DMD, whose networks may also predict different quantities (rare).
template <class F>
void with_streams(bool uncond, bool gate, bool same, const F& f) {
  if (same) with_streams(uncond, gate, [&](auto u, auto g) { f(u, g, std::true_type{}); });
  else if (gate) f(std::true_type{}, std::true_type{}, std::false_type{});
  else f(std::true_type{}, std::false_type{}, std::false_type{});
}

inline std::optional<Tensor> or_cond(const std::optional<Tensor>& uncond, const Tensor& cond, bool needed) {
  return uncond || !needed ? uncond : cond;
}

// The first N of the tensors that are there, in order.
template <int N>
std::array<Tensor, N> present(std::initializer_list<std::optional<Tensor>> tensors) {
  std::array<Tensor, N> out;
  int n = 0;
  for (const auto& t : tensors)
    if (t && n < N) out[n++] = *t;
  return out;
}

// x's dtype is the gradient's; the arithmetic is float64 as soon as x or a stream is.
inline ScalarType arithmetic_of(std::initializer_list<std::optional<Tensor>> streams, ScalarType x) {
  for (const auto& t : streams)
    if (x == ScalarType::Double || (t && t->scalar_type() == ScalarType::Double)) return ScalarType::Double;
  return ScalarType::Float;
}

inline double reduction_scale(Reduction reduction, bool counted, int64_t rows, int64_t size) {
  if (reduction == Reduction::mean) return counted ? 1.0 : 1.0 / static_cast<double>(std::max<int64_t>(rows * size, 1));
  return reduction == Reduction::sum_per_batch ? 1.0 / static_cast<double>(std::max<int64_t>(rows, 1)) : 1.0;
}

inline Tensor matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  if (rows == 1) return new_vector(like, columns, dtype);
  const int64_t sizes[] = {rows, columns}, strides[] = {std::max<int64_t>(columns, 1), 1};
  return empty_strided(like, {sizes, 2}, {strides, 2}, dtype);
}

// Memory of the outputs of a loss over rows of `groups`.
struct Result {
  Tensor terms, coefficients, stats, grad;

  template <class Device, int N>
  static Result of(const Rows<N>& rows, const Groups& groups, ScalarType arithmetic, int coefficients, int stats,
                   ScalarType dtype, bool with_grad) {
    const Tensor& like = rows.tensors[0];
    return {new_vector(like, groups.count, arithmetic), matrix(like, coefficients, rows.count, arithmetic),
            matrix(like, stats, groups.count, arithmetic),
            with_grad ? Device::new_output(rows, dtype) : new_vector(like, 0, dtype)};
  }

  template <class Device, class T>
  Outputs outputs(Reduction reduction) const {
    return {reduction == Reduction::none ? terms : Device::template sum<T>(terms), coefficients, stats, grad};
  }
};

inline Output output_of(const Tensor& grad, bool wanted) {
  return {wanted ? grad.mutable_data_ptr() : nullptr, grad.scalar_type()};
}

template <class Device, class T, class Field, int N>
Outputs field_loss(const Field& field, const Rows<N>& rows, const Groups& groups, Reduction reduction,
                   const std::optional<Tensor>& count, ScalarType arithmetic, ScalarType dtype, bool with_grad) {
  using Formula = FieldLoss<T, Field>;
  const Result result = Result::of<Device>(rows, groups, arithmetic, 1, Formula::kStats, dtype, with_grad);
  const Formula formula{field,
                        T(groups.rows * rows.size),
                        T(reduction_scale(reduction, count.has_value(), rows.count, rows.size)),
                        data_or_null<T>(count),
                        mutable_data<T>(result.terms),
                        mutable_data<T>(result.coefficients),
                        mutable_data<T>(result.stats),
                        groups};
  Device::template rowwise<T>(formula, groups, rows, output_of(result.grad, with_grad));
  return result.outputs<Device, T>(reduction);
}

template <class Device, class T, class Formula, int N>
Tensor map_again(const Formula& formula, const Rows<N>& rows, ScalarType dtype) {
  const Tensor grad = Device::new_output(rows, dtype);
  Device::template rowwise<T>(formula, Groups::single(rows.count), rows, output_of(grad, true));
  return grad;
}

// 1 / the elements of a group: sums over groups become means.
template <class T>
T mean_of(const Groups& groups, int64_t size) {
  return T(1.0 / static_cast<double>(groups.rows * size));
}

}  // namespace distillation

template <class Device>
distillation::Outputs score_difference(const Tensor& pred, const Tensor& target, const std::optional<Tensor>& uncond,
                         std::optional<Tensor> weight, const std::optional<Tensor>& gate, double guidance, double clip,
                         ScalarType dtype, int64_t reduction, bool with_grad) {
  using namespace distillation;
  const auto arithmetic = arithmetic_of({pred, target, uncond, gate}, dtype);
  weight = row_scalars(weight, arithmetic);
  Outputs out;
  with_arithmetic(arithmetic, [&](auto zero) {
    with_streams(uncond.has_value(), gate.has_value(), [&](auto has_uncond, auto has_gate) {
      using T = decltype(zero);
      using Field = ScoreField<T, has_uncond, has_gate>;
      const Rows<Field::kStreams> rows(
          present<Field::kStreams>({pred, target, or_cond(uncond, pred, has_uncond), gate}));
      const Groups groups = Groups::single(rows.count);
      const Field field{data_or_null<T>(weight), T(guidance), T(clip), mean_of<T>(groups, rows.size)};
      out = field_loss<Device, T>(field, rows, groups, option<Reduction>(reduction), std::nullopt, arithmetic, dtype, with_grad);
    });
  });
  return out;
}

template <class Device>
Tensor score_difference_backward(const Tensor& grad, const Tensor& pred, const Tensor& target,
                                 const std::optional<Tensor>& uncond, std::optional<Tensor> weight,
                                 const std::optional<Tensor>& gate, double guidance, double clip, ScalarType dtype) {
  using namespace distillation;
  const auto arithmetic = arithmetic_of({pred, target, uncond, gate}, dtype);
  weight = row_scalars(weight, arithmetic);
  const auto row_grad = row_scalars(grad, arithmetic);
  Tensor out;
  with_arithmetic(arithmetic, [&](auto zero) {
    with_streams(uncond.has_value(), gate.has_value(), [&](auto has_uncond, auto has_gate) {
      using T = decltype(zero);
      using Field = ScoreField<T, has_uncond, has_gate>;
      const Rows<Field::kMapStreams> rows(
          present<Field::kMapStreams>({pred, target, or_cond(uncond, pred, has_uncond), gate}));
      const Field field{data_or_null<T>(weight), T(guidance), T(clip), T(1)};
      out = map_again<Device, T>(FieldBackward<T, Field>{field, data_or_null<T>(row_grad)}, rows, dtype);
    });
  });
  return out;
}

template <class Device>
distillation::Outputs dmd(const Tensor& x, const Tensor& x_t, const Tensor& real, const Tensor& fake,
            const std::optional<Tensor>& uncond, std::optional<Tensor> weight, const std::optional<Tensor>& gate,
            const Tensor& alpha_t, const Tensor& sigma_t, int64_t type, int64_t fake_type,
            double guidance, ScalarType dtype, std::optional<Tensor> count, bool normalize, double minimum, double eps,
            int64_t group_rows, int64_t reduction, bool with_grad) {
  using namespace distillation;
  const auto arithmetic = arithmetic_of({x, x_t, real, fake, uncond, gate}, dtype);
  weight = row_scalars(weight, arithmetic);
  count = row_scalars(count, arithmetic);
  const auto alpha = row_scalars(alpha_t, arithmetic), sigma = row_scalars(sigma_t, arithmetic);
  Outputs out;
  with_arithmetic(arithmetic, [&](auto zero) {
    const bool one_type = type == fake_type;
    with_streams(uncond.has_value(), gate.has_value(), one_type, [&](auto has_uncond, auto has_gate, auto same) {
      using T = decltype(zero);
      using Field = DmdField<T, has_uncond, has_gate, same>;
      const Rows<Field::kStreams> rows(
          present<Field::kStreams>({real, fake, or_cond(uncond, real, has_uncond), gate, x_t, x}));
      const Groups groups = Groups::consecutive(rows.count, group_rows);
      const Field field{data_or_null<T>(weight), data_or_null<T>(alpha), data_or_null<T>(sigma),
                        option<Prediction>(type),        option<Prediction>(fake_type),  T(guidance),
                        mean_of<T>(groups, rows.size), {normalize, T(minimum), T(eps)}};
      out = field_loss<Device, T>(field, rows, groups, option<Reduction>(reduction), count, arithmetic, dtype, with_grad);
    });
  });
  return out;
}

template <class Device>
Tensor dmd_backward(const Tensor& grad, const std::optional<Tensor>& x_t, const Tensor& real, const Tensor& fake,
                    const std::optional<Tensor>& uncond, std::optional<Tensor> weight,
                    const std::optional<Tensor>& gate, const Tensor& alpha_t, const Tensor& sigma_t,
                    int64_t type, int64_t fake_type, double guidance, ScalarType dtype) {
  using namespace distillation;
  const auto arithmetic = arithmetic_of({x_t, real, fake, uncond, gate}, dtype);
  weight = row_scalars(weight, arithmetic);
  const auto row_grad = row_scalars(grad, arithmetic);
  const auto alpha = row_scalars(alpha_t, arithmetic), sigma = row_scalars(sigma_t, arithmetic);
  Tensor out;
  with_arithmetic(arithmetic, [&](auto zero) {
    const bool one_type = type == fake_type;
    with_streams(uncond.has_value(), gate.has_value(), one_type, [&](auto has_uncond, auto has_gate, auto same) {
      using T = decltype(zero);
      using Field = DmdField<T, has_uncond, has_gate, same>;
      const Rows<Field::kMapStreams> rows(
          present<Field::kMapStreams>({real, fake, or_cond(uncond, real, has_uncond), gate, x_t}));
      const Field field{data_or_null<T>(weight), data_or_null<T>(alpha), data_or_null<T>(sigma), option<Prediction>(type),
                        option<Prediction>(fake_type),   T(guidance),            T(1),                   {}};
      out = map_again<Device, T>(FieldBackward<T, Field>{field, data_or_null<T>(row_grad)}, rows, dtype);
    });
  });
  return out;
}

template <class Device>
distillation::Outputs decoupled_dmd(const Tensor& x, const Tensor& ca_x_t, const Tensor& dm_x_t, const Tensor& dm_real,
                      const Tensor& dm_fake, const Tensor& ca_real, const Tensor& ca_uncond,
                      std::optional<Tensor> weight, const std::optional<Tensor>& gate, const Tensor& dm_alpha_t,
                      const Tensor& dm_sigma_t, const Tensor& ca_alpha_t, const Tensor& ca_sigma_t,
                      int64_t type, int64_t fake_type, double guidance, ScalarType dtype,
                      std::optional<Tensor> count, bool normalize, double minimum, double eps, int64_t group_rows,
                      int64_t reduction, bool with_grad) {
  using namespace distillation;
  const auto arithmetic = arithmetic_of({x, ca_x_t, dm_x_t, dm_real, dm_fake, ca_real, ca_uncond, gate}, dtype);
  weight = row_scalars(weight, arithmetic);
  count = row_scalars(count, arithmetic);
  const auto dm_alpha = row_scalars(dm_alpha_t, arithmetic), dm_sigma = row_scalars(dm_sigma_t, arithmetic);
  const auto ca_alpha = row_scalars(ca_alpha_t, arithmetic), ca_sigma = row_scalars(ca_sigma_t, arithmetic);
  Outputs out;
  with_arithmetic(arithmetic, [&](auto zero) {
    with_flag(gate.has_value(), [&](auto has_gate) {
      with_flag(type == fake_type, [&](auto same) {
        using T = decltype(zero);
        using Field = DecoupledField<T, has_gate, same>;
        using Formula = DecoupledLoss<T, Field>;
        const Rows<Field::kStreams> rows(
            present<Field::kStreams>({dm_real, dm_fake, ca_real, ca_uncond, gate, dm_x_t, ca_x_t, x}));
        const Groups groups = Groups::consecutive(rows.count, group_rows);
        const Result result = Result::of<Device>(rows, groups, arithmetic, 2, Formula::kStats, dtype, with_grad);
        T* coefficients = mutable_data<T>(result.coefficients);
        const Field field{data_or_null<T>(weight),
                          data_or_null<T>(dm_alpha),
                          data_or_null<T>(dm_sigma),
                          data_or_null<T>(ca_alpha),
                          data_or_null<T>(ca_sigma),
                          option<Prediction>(type),
                          option<Prediction>(fake_type),
                          T(guidance),
                          mean_of<T>(groups, rows.size),
                          {normalize, T(minimum), T(eps)},
                          coefficients + rows.count};
        const Formula formula{field,
                              T(groups.rows * rows.size),
                              T(reduction_scale(option<Reduction>(reduction), count.has_value(), rows.count, rows.size)),
                              data_or_null<T>(count),
                              mutable_data<T>(result.terms),
                              coefficients,
                              mutable_data<T>(result.stats),
                              groups};
        Device::template rowwise<T>(formula, groups, rows, output_of(result.grad, with_grad));
        out = result.outputs<Device, T>(option<Reduction>(reduction));
      });
    });
  });
  return out;
}

template <class Device>
Tensor decoupled_dmd_backward(const Tensor& grad, const std::optional<Tensor>& dm_x_t, const Tensor& dm_real,
                              const Tensor& dm_fake, const Tensor& ca_real, const Tensor& ca_uncond,
                              std::optional<Tensor> weight, const std::optional<Tensor>& gate,
                              const Tensor& dm_alpha_t, const Tensor& dm_sigma_t, const Tensor& ca_alpha_t,
                              const Tensor& ca_sigma_t, int64_t type, int64_t fake_type,
                              double guidance, ScalarType dtype) {
  using namespace distillation;
  const auto arithmetic = arithmetic_of({dm_x_t, dm_real, dm_fake, ca_real, ca_uncond, gate}, dtype);
  weight = row_scalars(weight, arithmetic);
  const auto row_grad = row_scalars(grad, arithmetic);
  const auto dm_alpha = row_scalars(dm_alpha_t, arithmetic), dm_sigma = row_scalars(dm_sigma_t, arithmetic);
  const auto ca_alpha = row_scalars(ca_alpha_t, arithmetic), ca_sigma = row_scalars(ca_sigma_t, arithmetic);
  Tensor out;
  with_arithmetic(arithmetic, [&](auto zero) {
    with_flag(gate.has_value(), [&](auto has_gate) {
      with_flag(type == fake_type, [&](auto same) {
        using T = decltype(zero);
        using Field = DecoupledField<T, has_gate, same>;
        const Rows<Field::kMapStreams> rows(
            present<Field::kMapStreams>({dm_real, dm_fake, ca_real, ca_uncond, gate, dm_x_t}));
        const T* coefficients = data_or_null<T>(row_grad);
        const Field field{data_or_null<T>(weight),
                          data_or_null<T>(dm_alpha),
                          data_or_null<T>(dm_sigma),
                          data_or_null<T>(ca_alpha),
                          data_or_null<T>(ca_sigma),
                          option<Prediction>(type),
                          option<Prediction>(fake_type),
                          T(guidance),
                          T(1),
                          {},
                          coefficients + rows.count};
        out = map_again<Device, T>(DecoupledBackward<T, Field>{field, coefficients}, rows, dtype);
      });
    });
  });
  return out;
}

template <class Device>
void register_score_distillation(torch::stable::detail::StableLibrary& m) {
  m.impl("score_difference", TORCH_BOX(&score_difference<Device>));
  m.impl("score_difference_backward", TORCH_BOX(&score_difference_backward<Device>));
  m.impl("dmd", TORCH_BOX(&dmd<Device>));
  m.impl("dmd_backward", TORCH_BOX(&dmd_backward<Device>));
  m.impl("decoupled_dmd", TORCH_BOX(&decoupled_dmd<Device>));
  m.impl("decoupled_dmd_backward", TORCH_BOX(&decoupled_dmd_backward<Device>));
}

}  // namespace fastgen
