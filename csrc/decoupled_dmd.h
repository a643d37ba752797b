// Decoupled DMD (arXiv 2511.22677), of the family score_distillation: two terms, each at its own noise level.
#pragma once

#include "score_distillation.h"

namespace fastgen {

// G = w (f - r_cond)|DM / n_DM - w (s - 1) (r_cond - r_uncond)|CA / n_CA, each term at its own noise level.
// Streams: dm_real, dm_fake, ca_real, ca_uncond, [gate], dm_x_t, ca_x_t, x.
template <class T, bool kGate, bool kSame>
struct DecoupledField {
  static constexpr int kStreams = 7 + kGate, kMapStreams = kStreams - (kSame ? 3 : 2);
  static constexpr int kDmNoisy = kStreams - 3, kCaNoisy = kStreams - 2, kSample = kStreams - 1;
  static constexpr bool kMasks = kGate;
  struct Row {
    T scale, weight, guidance;
    Mixture<T> real, fake, ca;
  };
  const T *weight, *dm_alpha, *dm_sigma, *ca_alpha, *ca_sigma;
  Prediction real_type, fake_type;
  T guidance, scale;
  Normalizer<T> normalize;

  FASTGEN_HD Row row(int64_t row) const {
    const T w = weight ? weight[row] : T(1);
    const Mixture<T> ca = x0_from(real_type, ca_alpha[row], ca_sigma[row]);
    return {scale, w, w * (guidance - T(1)) * ca.b, x0_from(real_type, dm_alpha[row], dm_sigma[row]),
            x0_from(fake_type, dm_alpha[row], dm_sigma[row]), ca};
  }
  FASTGEN_HD T dm(const Row& row, const T* v) const {
    T difference;
    if constexpr (kSame) difference = row.real.b * (v[1] - v[0]);
    else difference = row.fake(v[kDmNoisy], v[1]) - row.real(v[kDmNoisy], v[0]);
    return gated<kGate>(row.weight * difference, v + 4);
  }
  FASTGEN_HD T ca(const Row& row, const T* v) const { return gated<kGate>(row.guidance * (v[3] - v[2]), v + 4); }
  // `coefficients`: of DM and of CA; both are 0 where a row is skipped.
  FASTGEN_HD T element(const Row& row, const Numbers<T, 2>& coefficients, const T* v) const {
    const T g = coefficients[0] * dm(row, v) + coefficients[1] * ca(row, v);
    return coefficients[0] == T(0) ? T(0) : g;
  }
};

template <class T, class Field>
struct DecoupledLoss {
  static constexpr int kStreams = Field::kStreams, kSums = 7, kMapStreams = Field::kMapStreams;
  static constexpr bool kMasks = Field::kMasks;
  static constexpr int kStats = 5;  // rows of `stats`: sum of |G| of DM and of CA, both normalisers, 1 if skipped
  using Row = typename Field::Row;
  Field field;
  T elements, reduction;
  const T* count;
  T* terms;         // [groups]
  T* coefficients;  // [2, rows]: of DM, of CA
  T* stats;         // [kStats, groups]
  Groups groups;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return field.row(row); }
  FASTGEN_HD void accumulate(const Row& row, const T* v, T* sums) const {
    const T dm = field.dm(row, v), ca = field.ca(row, v);
    sums[0] += std::abs(v[Field::kSample] - row.real(v[Field::kDmNoisy], v[0]));
    sums[1] += std::abs(v[Field::kSample] - row.ca(v[Field::kCaNoisy], v[2]));
    sums[2] += std::abs(dm);
    sums[3] += std::abs(ca);
    sums[4] += dm * dm;
    sums[5] += dm * ca;
    sums[6] += ca * ca;
  }
  FASTGEN_HD Numbers<T, 2> epilogue(int64_t group, const T* sums) const {
    const T n_dm = field.normalize(sums[0]), n_ca = field.normalize(sums[1]);
    const T dm = T(1) / n_dm, ca = T(1) / n_ca;
    const bool finite = std::isfinite(n_dm) && std::isfinite(dm) && std::isfinite(sums[2] * dm) &&
                        std::isfinite(n_ca) && std::isfinite(ca) && std::isfinite(sums[3] * ca);
    const T scale = count ? reduction / (*count < T(1) ? T(1) : *count) : reduction;
    const T squares = sums[4] * dm * dm + T(2) * sums[5] * dm * ca + sums[6] * ca * ca;
    terms[group] = finite ? T(0.5) * scale * elements * (squares < T(0) ? T(0) : squares) : T(0);
    stats[group] = finite ? elements * sums[2] * dm : T(0);
    stats[groups.count + group] = finite ? elements * sums[3] * ca : T(0);
    stats[2 * groups.count + group] = n_dm;
    stats[3 * groups.count + group] = n_ca;
    stats[4 * groups.count + group] = finite ? T(0) : T(1);
    const Numbers<T, 2> slopes{{finite ? scale * dm : T(0), finite ? scale * ca : T(0)}};
    const int64_t rows = groups.count * groups.rows;
    for (int64_t r = 0; r < groups.rows; ++r)
      for (int k = 0; k < 2; ++k) coefficients[k * rows + groups.row(group, r)] = slopes[k];
    return slopes;
  }
  FASTGEN_HD Numbers<T, 2> coefficient(int64_t, int64_t, const Row&, const Numbers<T, 2>& slopes) const {
    return slopes;
  }
  FASTGEN_HD T map(const Row& row, const Numbers<T, 2>& coefficients, const T* v) const {
    return field.element(row, coefficients, v);
  }
};

template <class T, class Field>
struct DecoupledBackward {
  static constexpr int kStreams = Field::kMapStreams, kSums = 0, kMapStreams = Field::kMapStreams;
  static constexpr bool kMasks = Field::kMasks;
  using Row = typename Field::Row;
  Field field;
  const T* grad;  // [2, rows]
  int64_t rows;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return field.row(row); }
  FASTGEN_HD Numbers<T, 2> coefficient(int64_t row, int64_t, const Row&, T) const {
    return {{grad[row], grad[rows + row]}};
  }
  FASTGEN_HD T map(const Row& row, const Numbers<T, 2>& coefficients, const T* v) const {
    return field.element(row, coefficients, v);
  }
};

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
        const Field field{data_or_null<T>(weight),
                          data_or_null<T>(dm_alpha),
                          data_or_null<T>(dm_sigma),
                          data_or_null<T>(ca_alpha),
                          data_or_null<T>(ca_sigma),
                          option<Prediction>(type),
                          option<Prediction>(fake_type),
                          T(guidance),
                          mean_of<T>(groups, rows.size),
                          {normalize, T(minimum), T(eps)}};
        const Formula formula{field,
                              T(groups.rows * rows.size),
                              T(reduction_scale(option<Reduction>(reduction), count.has_value(), rows.count,
                                                rows.size)),
                              data_or_null<T>(count),
                              mutable_data<T>(result.terms),
                              mutable_data<T>(result.coefficients),
                              mutable_data<T>(result.stats),
                              groups};
        out = result.outputs<Device, T>(formula, groups, rows, option<Reduction>(reduction), with_grad);
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
        const Field field{data_or_null<T>(weight),
                          data_or_null<T>(dm_alpha),
                          data_or_null<T>(dm_sigma),
                          data_or_null<T>(ca_alpha),
                          data_or_null<T>(ca_sigma),
                          option<Prediction>(type),
                          option<Prediction>(fake_type),
                          T(guidance),
                          T(1),
                          {}};
        const DecoupledBackward<T, Field> formula{field, data_or_null<T>(row_grad), rows.count};
        out = map_again<Device, T>(formula, rows, dtype);
      });
    });
  });
  return out;
}

template <class Device>
void register_decoupled_dmd(torch::stable::detail::StableLibrary& m) {
  m.impl("decoupled_dmd", TORCH_BOX(&decoupled_dmd<Device>));
  m.impl("decoupled_dmd_backward", TORCH_BOX(&decoupled_dmd_backward<Device>));
}

}  // namespace fastgen
