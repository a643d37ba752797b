// Score distillation: SDS (arXiv 2209.14988), VSD (arXiv 2305.16213), DMD (arXiv 2311.18828, 2405.14867) and Decoupled
// DMD (arXiv 2511.22677). Each is a gradient field G; the loss value is G²/2, summed or averaged.
//
// A field knows its streams and, without the normaliser, one element of G; FieldLoss reduces, normalises and maps
// it, FieldBackward maps it again. Common to all fields:
//   kUncond  a stream of unconditional predictions, for guidance: uncond + s (cond - uncond)
//   kGate    a stream that multiplies G: a mask or a map of weights. Where it is 0, G is 0 whatever the rest is.
// What the map reads comes first among the streams (formula.h).
#pragma once

#include <tuple>

#include "prediction.h"
#include "runtime/device.h"
#include "runtime/options.h"

namespace fastgen {

template <bool kGate, class T>
FASTGEN_HD T gated(T value, const T* gate) {
  if constexpr (kGate) return *gate == T(0) ? T(0) : *gate * value;
  else return value;
}

// What divides G, from the mean of |x - r|. NaN stays NaN.
template <class T>
struct Normalizer {
  bool on;
  T minimum, eps;

  FASTGEN_HD T operator()(T mean) const { return on ? (mean < minimum ? minimum : mean) + eps : T(1); }
};

// A coefficient of 0 marks a skipped row: its elements may be infinite, and 0 · inf is NaN.
template <class T>
FASTGEN_HD T scaled(T coefficient, T value) {
  return coefficient == T(0) ? T(0) : coefficient * value;
}

// G = w (pred_cfg - target): SDS with the noise as target, VSD with the fake score. Clipped to ±clip, as SDS codes do.
// Streams: pred, target, [uncond], [gate].
template <class T, bool kUncond, bool kGate>
struct ScoreField {
  static constexpr int kStreams = 2 + kUncond + kGate, kMapStreams = kStreams;
  static constexpr bool kMasks = kGate;
  struct Row {
    T scale, weight;
  };
  const T* weight;
  T guidance, clip, scale;

  FASTGEN_HD Row row(int64_t row) const { return {scale, weight ? weight[row] : T(1)}; }
  FASTGEN_HD T unclipped(const Row& row, const T* v) const {
    return gated<kGate>(row.weight * (guided<kUncond>(v[0], guidance, v + 2) - v[1]), v + 2 + kUncond);
  }
  FASTGEN_HD T element(const Row& row, const T* v) const {
    const T g = unclipped(row, v);
    return clamped(g, -clip, clip);
  }
  FASTGEN_HD T residual(const Row& row, const T* v) const { return unclipped(row, v); }
  // Not finite where G was not before the clip, which would hide it.
  FASTGEN_HD T normalizer(T mean) const { return T(1) + T(0) * mean; }
};

// G = w (f - r_cfg) / n, with n from the mean of |x - r_cfg|; r and f are x0-predictions made of raw network outputs.
// Streams: real, fake, [uncond], [gate], x_t, x. kSame: both networks predict the same quantity. Then x_t cancels from
// f - r, exactly, and so does most of the rounding error at high noise; and the map need not read it.
template <class T, bool kUncond, bool kGate, bool kSame>
struct DmdField {
  static constexpr int kStreams = 4 + kUncond + kGate, kMapStreams = kStreams - (kSame ? 2 : 1);
  static constexpr int kNoisy = kStreams - 2, kSample = kStreams - 1;
  static constexpr bool kMasks = kGate;
  struct Row {
    T scale, weight;
    Mixture<T> real, fake;
  };
  const T *weight, *alpha, *sigma;
  Prediction real_type, fake_type;
  T guidance, scale;
  Normalizer<T> normalize;

  FASTGEN_HD Row row(int64_t row) const {
    return {scale, weight ? weight[row] : T(1), x0_from(real_type, alpha[row], sigma[row]),
            x0_from(fake_type, alpha[row], sigma[row])};
  }
  FASTGEN_HD T element(const Row& row, const T* v) const {
    const T real = guided<kUncond>(v[0], guidance, v + 2);
    T difference;
    if constexpr (kSame) difference = row.real.b * (v[1] - real);
    else difference = row.fake(v[kNoisy], v[1]) - row.real(v[kNoisy], real);
    return gated<kGate>(row.weight * difference, v + 2 + kUncond);
  }
  FASTGEN_HD T residual(const Row& row, const T* v) const {
    return v[kSample] - row.real(v[kNoisy], guided<kUncond>(v[0], guidance, v + 2));
  }
  FASTGEN_HD T normalizer(T mean) const { return normalize(mean); }
};

// Everything of a field with one term in one pass: normaliser, loss, statistics, and G times d loss / d G.
template <class T, class Field>
struct FieldLoss {
  static constexpr int kStreams = Field::kStreams, kSums = 3, kMapStreams = Field::kMapStreams;
  static constexpr bool kMasks = Field::kMasks;
  static constexpr int kStats = 3;  // rows of `stats`: sum of |G|, normaliser, 1 if skipped
  using Row = typename Field::Row;
  Field field;
  T elements;       // of a group
  T reduction;      // d loss / d (sum of G²/2), to be divided by `count` where there is one
  const T* count;
  T* terms;         // [groups]
  T* coefficients;  // [rows]: the gradient is coefficient * element
  T* stats;         // [kStats, groups]
  Groups groups;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return field.row(row); }
  FASTGEN_HD void accumulate(const Row& row, const T* v, T* sums) const {
    const T g = field.element(row, v);
    sums[0] += std::abs(field.residual(row, v));
    sums[1] += g * g;
    sums[2] += std::abs(g);
  }
  FASTGEN_HD T epilogue(int64_t group, const T* sums) const {
    const T n = field.normalizer(sums[0]), inverse = T(1) / n;
    const bool finite = std::isfinite(n) && std::isfinite(inverse) && std::isfinite(sums[2] * inverse);
    const T scale = count ? reduction / (*count < T(1) ? T(1) : *count) : reduction;
    terms[group] = finite ? T(0.5) * scale * elements * (sums[1] * inverse) * inverse : T(0);
    stats[group] = finite ? elements * (sums[2] * inverse) : T(0);
    stats[groups.count + group] = n;
    stats[2 * groups.count + group] = finite ? T(0) : T(1);
    const T slope = finite ? scale * inverse : T(0);
    for (int64_t r = 0; r < groups.rows; ++r) coefficients[groups.row(group, r)] = slope;
    return slope;
  }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row&, T slope) const { return slope; }
  FASTGEN_HD T map(const Row& row, T coefficient, const T* v) const {
    return scaled(coefficient, field.element(row, v));
  }
};

// The same gradient again, of its map streams alone: grad holds the coefficients times the loss's gradient.
template <class T, class Field>
struct FieldBackward {
  static constexpr int kStreams = Field::kMapStreams, kSums = 0, kMapStreams = Field::kMapStreams;
  static constexpr bool kMasks = Field::kMasks;
  using Row = typename Field::Row;
  Field field;
  const T* grad;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return field.row(row); }
  FASTGEN_HD T coefficient(int64_t row, int64_t, const Row&, T) const { return grad[row]; }
  FASTGEN_HD T map(const Row& row, T coefficient, const T* v) const {
    return scaled(coefficient, field.element(row, v));
  }
};

namespace distillation {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, coefficients, stats, grad

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

inline double reduction_scale(Reduction reduction, bool counted, int64_t rows, int64_t size) {
  if (reduction == Reduction::mean) return counted ? 1.0 : 1.0 / static_cast<double>(std::max<int64_t>(rows * size, 1));
  return reduction == Reduction::sum_per_batch ? 1.0 / static_cast<double>(std::max<int64_t>(rows, 1)) : 1.0;
}

// `count` numbers a row or a group; one of them has no dimension of its own.
inline Tensor stacked(const Tensor& like, int64_t count, int64_t size, ScalarType dtype) {
  return count == 1 ? new_vector(like, size, dtype) : new_matrix(like, count, size, dtype);
}

// Memory of the outputs of a loss over rows of `groups`.
struct Result {
  Tensor terms, coefficients, stats, grad;

  template <class Device, int N>
  static Result of(const Rows<N>& rows, const Groups& groups, ScalarType arithmetic, int coefficients, int stats,
                   ScalarType dtype, bool with_grad) {
    const Tensor& like = rows.tensors[0];
    return {new_vector(like, groups.count, arithmetic), stacked(like, coefficients, rows.count, arithmetic),
            stacked(like, stats, groups.count, arithmetic),
            with_grad ? Device::new_output(rows, dtype) : new_vector(like, 0, dtype)};
  }

  template <class Device, class T, class F, int N>
  Outputs outputs(const F& formula, const Groups& groups, const Rows<N>& rows, Reduction reduction,
                  bool with_grad) const {
    const Output out = output_of(grad, with_grad);
    return {Device::template rowwise_loss<T>(formula, groups, rows, out, terms, reduction), coefficients, stats, grad};
  }
};

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
  return result.outputs<Device, T>(formula, groups, rows, reduction, with_grad);
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
      out = field_loss<Device, T>(field, rows, groups, option<Reduction>(reduction), std::nullopt, arithmetic, dtype,
                                  with_grad);
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
                        option<Prediction>(type), option<Prediction>(fake_type), T(guidance),
                        mean_of<T>(groups, rows.size), {normalize, T(minimum), T(eps)}};
      out = field_loss<Device, T>(field, rows, groups, option<Reduction>(reduction), count, arithmetic, dtype,
                                  with_grad);
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
      const Field field{data_or_null<T>(weight),  data_or_null<T>(alpha),        data_or_null<T>(sigma),
                        option<Prediction>(type), option<Prediction>(fake_type), T(guidance),
                        T(1),                     {}};
      out = map_again<Device, T>(FieldBackward<T, Field>{field, data_or_null<T>(row_grad)}, rows, dtype);
    });
  });
  return out;
}

template <class Device>
void register_score_difference(torch::stable::detail::StableLibrary& m) {
  m.impl("score_difference", TORCH_BOX(&score_difference<Device>));
  m.impl("score_difference_backward", TORCH_BOX(&score_difference_backward<Device>));
}

template <class Device>
void register_dmd(torch::stable::detail::StableLibrary& m) {
  m.impl("dmd", TORCH_BOX(&dmd<Device>));
  m.impl("dmd_backward", TORCH_BOX(&dmd_backward<Device>));
}

}  // namespace fastgen
