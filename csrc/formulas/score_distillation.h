// Score distillation: SDS (arXiv 2209.14988), VSD (arXiv 2305.16213), DMD (arXiv 2311.18828, 2405.14867) and Decoupled
// DMD (arXiv 2511.22677). Each is a gradient field G; the loss value is G²/2, summed or averaged.
//
// A field knows its streams and, without the normaliser, one element of G; FieldLoss reduces, normalises and maps
// it, FieldBackward maps it again. Common to all fields:
//   kUncond  a stream of unconditional predictions, for guidance: uncond + s (cond - uncond)
//   kGate    a stream that multiplies G: a mask or a map of weights. Where it is 0, G is 0 whatever the rest is.
// What the map reads comes first among the streams (formula.h).
#pragma once

#include "formula.h"

namespace fastgen {

enum class Prediction : int { epsilon, sample, v_prediction, flow_prediction };

// a x_t + b pred, which is what every kind of prediction says of x0 and of the noise.
template <class T>
struct Mixture {
  T a, b;

  FASTGEN_HD T operator()(T x_t, T pred) const { return a * x_t + b * pred; }
};

template <class T>
FASTGEN_HD Mixture<T> x0_from(Prediction type, T alpha, T sigma) {
  switch (type) {
    case Prediction::epsilon: return {T(1) / alpha, -sigma / alpha};
    case Prediction::sample: return {T(0), T(1)};
    case Prediction::v_prediction: {
      const T norm = alpha * alpha + sigma * sigma;
      return {alpha / norm, -sigma / norm};
    }
    default: {  // of a flow, 1 - sigma = alpha, x_t - sigma pred to the bit
      const T total = alpha + sigma;
      return {T(1) / total, -sigma / total};
    }
  }
}

template <bool kUncond, class T>
FASTGEN_HD T guided(T cond, T scale, const T* uncond) {
  if constexpr (kUncond) return *uncond + scale * (cond - *uncond);
  else return cond;
}

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

// G = w (f - r_cond)|DM / n_DM - w (s - 1) (r_cond - r_uncond)|CA / n_CA, each term at its own noise level.
// Streams: dm_real, dm_fake, ca_real, ca_uncond, [gate], dm_x_t, ca_x_t, x.
template <class T, bool kGate, bool kSame>
struct DecoupledField {
  static constexpr int kStreams = 7 + kGate, kMapStreams = kStreams - (kSame ? 3 : 2);
  static constexpr int kDmNoisy = kStreams - 3, kCaNoisy = kStreams - 2, kSample = kStreams - 1;
  static constexpr bool kMasks = kGate;
  struct Row {
    T scale, weight, guidance, ca_coefficient;
    Mixture<T> real, fake, ca;
  };
  const T *weight, *dm_alpha, *dm_sigma, *ca_alpha, *ca_sigma;
  Prediction real_type, fake_type;
  T guidance, scale;
  Normalizer<T> normalize;
  const T* ca_coefficients;  // [rows]: an epilogue hands on one number, and this is the other

  FASTGEN_HD Row row(int64_t row) const {
    const T w = weight ? weight[row] : T(1);
    const Mixture<T> ca = x0_from(real_type, ca_alpha[row], ca_sigma[row]);
    return {scale, w, w * (guidance - T(1)) * ca.b, ca_coefficients[row],
            x0_from(real_type, dm_alpha[row], dm_sigma[row]), x0_from(fake_type, dm_alpha[row], dm_sigma[row]), ca};
  }
  FASTGEN_HD T dm(const Row& row, const T* v) const {
    T difference;
    if constexpr (kSame) difference = row.real.b * (v[1] - v[0]);
    else difference = row.fake(v[kDmNoisy], v[1]) - row.real(v[kDmNoisy], v[0]);
    return gated<kGate>(row.weight * difference, v + 4);
  }
  FASTGEN_HD T ca(const Row& row, const T* v) const { return gated<kGate>(row.guidance * (v[3] - v[2]), v + 4); }
  FASTGEN_HD T element(const Row& row, T dm_coefficient, const T* v) const {
    const T g = dm_coefficient * dm(row, v) + row.ca_coefficient * ca(row, v);
    return dm_coefficient == T(0) ? T(0) : g;
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
  FASTGEN_HD T epilogue(int64_t group, const T* sums) const {
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
    T* ca_coefficients = coefficients + groups.count * groups.rows;
    for (int64_t r = 0; r < groups.rows; ++r) {
      coefficients[groups.row(group, r)] = finite ? scale * dm : T(0);
      ca_coefficients[groups.row(group, r)] = finite ? scale * ca : T(0);
    }
    return finite ? scale * dm : T(0);
  }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row&, T slope) const { return slope; }
  FASTGEN_HD T map(const Row& row, T coefficient, const T* v) const { return field.element(row, coefficient, v); }
};

template <class T, class Field>
struct DecoupledBackward {
  static constexpr int kStreams = Field::kMapStreams, kSums = 0, kMapStreams = Field::kMapStreams;
  static constexpr bool kMasks = Field::kMasks;
  using Row = typename Field::Row;
  Field field;  // its ca_coefficients are the second row of the gradient
  const T* grad;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return field.row(row); }
  FASTGEN_HD T coefficient(int64_t row, int64_t, const Row&, T) const { return grad[row]; }
  FASTGEN_HD T map(const Row& row, T coefficient, const T* v) const { return field.element(row, coefficient, v); }
};

}  // namespace fastgen
