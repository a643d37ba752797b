// ELBO differences: DDO (arXiv 2503.01103), Diffusion-DPO (arXiv 2311.12908) and the errors they are made of.
// Streams: prediction p, target y, frozen reference prediction q.
#pragma once

#include <tuple>

#include "runtime/device.h"
#include "runtime/options.h"

namespace fastgen {

template <class T>
FASTGEN_HD T softplus(T x) {
  return (x > T(0) ? x : T(0)) + std::log1p(std::exp(-std::abs(x)));
}

template <class T>
FASTGEN_HD T sigmoid(T x) {
  const T e = std::exp(-std::abs(x));
  return (x >= T(0) ? T(1) : e) / (T(1) + e);
}

enum class Penalty : int64_t { l2, l1, huber };

// Penalties on d = p - y: value and derivative. NaN stays NaN.
struct L2 {
  template <class T> FASTGEN_HD static T value(T d) { return d * d; }
  template <class T> FASTGEN_HD static T slope(T d) { return T(2) * d; }
};
struct L1 {
  template <class T> FASTGEN_HD static T value(T d) { return std::abs(d); }
  template <class T> FASTGEN_HD static T slope(T d) {
    const T sign = d > T(0) ? T(1) : d;  // as in clamped()
    return d < T(0) ? T(-1) : sign;
  }
};
struct Huber {  // threshold 1, as torch.nn.functional.huber_loss
  template <class T> FASTGEN_HD static T value(T d) {
    const T a = std::abs(d);
    return a < T(1) ? T(0.5) * d * d : a - T(0.5);
  }
  template <class T> FASTGEN_HD static T slope(T d) { return clamped(d, T(-1), T(1)); }
};

template <class T>
struct ScaledRow {
  T scale;
};

// error[i] = w_i * scale * sum_D penalty(p - y)
template <class T, class Penalty>
struct ElboError {
  static constexpr int kStreams = 2, kSums = 1, kMapStreams = 0;
  using Row = ScaledRow<T>;
  const T* weight;  // may be null: 1
  T scale;          // 1, or 1/D for the mean over elements
  T* error;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return {weight ? weight[row] * scale : scale}; }
  FASTGEN_HD void accumulate(const Row&, const T* v, T* sums) const { sums[0] += Penalty::value(v[0] - v[1]); }
  FASTGEN_HD T epilogue(int64_t group, const T* sums) const { return error[group] = sums[0]; }
};

// d error[i] / d p, times grad[i]
template <class T, class Penalty>
struct ElboErrorBackward {
  static constexpr int kStreams = 2, kSums = 0, kMapStreams = 2;
  using Row = ScaledRow<T>;
  const T* grad;
  const T* weight;
  T scale;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return {grad[row] * (weight ? weight[row] * scale : scale)}; }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row& row, T) const { return row.scale; }
  FASTGEN_HD T map(const Row&, T coefficient, const T* v) const { return coefficient * Penalty::slope(v[0] - v[1]); }
};

// The errors, which a loss adds up as they are, and d error[i] / d p in the same pass.
template <class T, class Penalty>
struct ElboErrorLoss : ElboError<T, Penalty> {
  static constexpr int kMapStreams = 2;
  static constexpr bool kMapsAtOnce = true;

  FASTGEN_HD T coefficient(int64_t, int64_t, const ScaledRow<T>& row, T) const { return row.scale; }
  FASTGEN_HD T map(const ScaledRow<T>&, T coefficient, const T* v) const {
    return coefficient * Penalty::slope(v[0] - v[1]);
  }
};

// The share of one element in sum_D (p - y)^2 - (q - y)^2, negated. Factored: the difference of the two sums cancels.
template <class T>
FASTGEN_HD T elbo_difference_element(T p, T y, T q) {
  return (q - p) * ((q - y) + (p - y));
}

// delta[i] = w_i * scale * sum_D (q - p)(q + p - 2y)
template <class T>
struct ElboDifference {
  static constexpr int kStreams = 3, kSums = 1, kMapStreams = 0;
  using Row = ScaledRow<T>;
  const T* weight;
  T scale;
  T* delta;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return {weight ? weight[row] * scale : scale}; }
  FASTGEN_HD void accumulate(const Row&, const T* v, T* sums) const {
    sums[0] += elbo_difference_element(v[0], v[1], v[2]);
  }
  FASTGEN_HD T epilogue(int64_t group, const T* sums) const { return delta[group] = sums[0]; }
};

// A loss of the group's m = sum_r share_r * delta_r. Link: term(group, m, slope), which sets d term / d m; and share(rank),
// where a group is not a row.
// Everything in one pass: terms, m, the slope of every row's error (for a later backward), and the gradient. A link whose
// members are its operator's own arguments, in their order, is all of it: see difference_loss() below.
template <class Link>
concept Shares = requires(const Link& link) { link.share(0); };

template <class T, class Link>
struct ElboDifferenceLoss {
  static constexpr int kStreams = 3, kSums = 1, kMapStreams = 2;
  using Row = ScaledRow<T>;
  Link link;
  Groups groups;
  const T* weight;
  T scale, term_scale;  // of a row's sum, of a term in the loss
  T* term;         // [groups]
  T* delta;        // [groups]
  T* error_slope;  // [rows]: d term / d error_r, where error_r = w_r * scale * sum_D (p - y)^2

  FASTGEN_HD T share(int64_t rank) const {
    if constexpr (Shares<Link>)
      return link.share(rank);
    else
      return T(1);
  }
  FASTGEN_HD Row row(int64_t row, int64_t rank) const {
    return {share(rank) * (weight ? weight[row] * scale : scale)};
  }
  FASTGEN_HD void accumulate(const Row&, const T* v, T* sums) const {
    sums[0] += elbo_difference_element(v[0], v[1], v[2]);
  }
  FASTGEN_HD T epilogue(int64_t group, const T* sums) const {
    T slope;
    delta[group] = sums[0];
    term[group] = term_scale * link.term(group, sums[0], &slope);
    slope *= term_scale;
    for (int64_t r = 0; r < groups.rows; ++r) error_slope[groups.row(group, r)] = -slope * share(r);
    return slope;
  }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row& constants, T slope) const { return -slope * constants.scale; }
  FASTGEN_HD T map(const Row&, T coefficient, const T* v) const { return coefficient * L2::slope(v[0] - v[1]); }
  FASTGEN_HD FlagCounts<T>& flag_counts()
    requires CountsFlags<Link>
  {
    return link.flag_counts();
  }
};

// Real images: softplus(-beta m) / n_real. Fakes: alpha softplus(beta m) / n_fake. m is the mean over an image's rows.
template <class T>
struct DdoLink {
  FlagCounts<T> real;  // ones where there is no division
  T alpha, beta, row_share;
  const T* alphas = nullptr;  // [groups]: instead of alpha

  // What a mean divides by is `counts`, {n_real, n_fake}, or where that is not there, how many flags are set.
  template <class Device>
  static typename Device::template Flags<T> flags(const Tensor& is_real, const std::optional<Tensor>& counts,
                                                  int64_t reduction) {
    const bool mean = option<Reduction>(reduction) == Reduction::mean;
    typename Device::template Flags<T> real(is_real, mean && !counts);
    if (mean && counts) real.counts.counted = data_or_null<T>(counts);
    return real;
  }

  FASTGEN_HD FlagCounts<T>& flag_counts() { return real; }
  FASTGEN_HD T share(int64_t) const { return row_share; }
  FASTGEN_HD T term(int64_t group, T m, T* slope) const {
    const bool is_real = real.flags[group] != 0;
    const T of_fake = alphas ? alphas[group] : alpha;
    const T weight = (is_real ? T(1) : of_fake) / real.of(is_real);  // a row present is counted: > 0
    const T signed_beta = is_real ? -beta : beta;
    *slope = weight * signed_beta * sigmoid(signed_beta * m);
    return weight * softplus(signed_beta * m);
  }
};

enum class Preference : int64_t { sigmoid, ipo, hinge };

// A preference loss of m = delta_winner - delta_loser.
template <class T>
struct PreferenceLink {
  T beta;
  int64_t kind;
  bool interleaved;

  Groups groups(int64_t rows) const { return interleaved ? Groups::consecutive(rows, 2) : Groups::halves(rows); }
  FASTGEN_HD T share(int64_t rank) const { return rank == 0 ? T(1) : T(-1); }
  FASTGEN_HD T term(int64_t, T m, T* slope) const {
    switch (static_cast<Preference>(kind)) {
      case Preference::sigmoid:
        *slope = T(-0.5) * beta * sigmoid(T(-0.5) * beta * m);
        return softplus(T(-0.5) * beta * m);
      case Preference::ipo: {
        const T d = m - T(0.5) / beta;
        *slope = T(2) * d;
        return d * d;
      }
      default: {
        const T d = T(1) - beta * m;
        const bool flat = d <= T(0);  // false for NaN, which must stay NaN
        *slope = flat ? T(0) : -beta + T(0) * d;
        return flat ? T(0) : d;
      }
    }
  }
};

template <class F>
void with_penalty(int64_t loss, const F& f) {
  switch (option<Penalty>(loss)) {
    case Penalty::l2: return f(L2{});
    case Penalty::l1: return f(L1{});
    default: return f(Huber{});
  }
}

inline double element_scale(bool element_mean, int64_t size) {
  return element_mean ? 1.0 / static_cast<double>(size) : 1.0;
}

template <class Device>
Tensor elbo_error(const Tensor& pred, const Tensor& target, std::optional<Tensor> weight, int64_t loss,
                  bool element_mean) {
  const Rows<2> rows({pred, target});
  const auto dtype = rows.arithmetic();
  weight = row_scalars(weight, dtype);
  const Tensor error = new_vector(pred, rows.count, dtype);
  with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_penalty(loss, [&](auto penalty) {
      const ElboError<T, decltype(penalty)> formula{data_or_null<T>(weight), T(element_scale(element_mean, rows.size)),
                                                    mutable_data<T>(error)};
      Device::template rowwise<T>(formula, Groups::single(rows.count), rows);
    });
  });
  return error;
}

template <class Device>
Tensor elbo_error_backward(const Tensor& grad, const Tensor& pred, const Tensor& target, std::optional<Tensor> weight,
                           int64_t loss, bool element_mean) {
  const Rows<2> rows({pred, target});
  const auto dtype = rows.arithmetic();
  weight = row_scalars(weight, dtype);
  const auto row_grad = row_scalars(grad, dtype);
  const Tensor grad_pred = Device::new_output(rows, pred.scalar_type());
  with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_penalty(loss, [&](auto penalty) {
      const ElboErrorBackward<T, decltype(penalty)> formula{data_or_null<T>(row_grad), data_or_null<T>(weight),
                                                            T(element_scale(element_mean, rows.size))};
      Device::template rowwise<T>(formula, Groups::single(rows.count), rows,
                                  {grad_pred.mutable_data_ptr(), pred.scalar_type()});
    });
  });
  return grad_pred;
}

template <class Device>
std::tuple<Tensor, Tensor> l1_distance(const Tensor& pred, const Tensor& target, double scale, bool with_grad) {
  const Rows<2> rows({pred, target});
  const auto dtype = rows.arithmetic();
  const Tensor term = new_vector(pred, rows.count, dtype);
  const Tensor grad_pred =
      with_grad ? Device::new_output(rows, pred.scalar_type()) : new_vector(pred, 0, pred.scalar_type());
  return with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    const ElboErrorLoss<T, L1> formula{{nullptr, T(scale), mutable_data<T>(term)}};
    const Tensor loss = Device::template rowwise_loss<T>(formula, Groups::single(rows.count), rows,
                                                         output_of(grad_pred, with_grad), term, Reduction::sum);
    return std::tuple(loss, grad_pred);
  });
}

template <class Device>
Tensor elbo_difference(const Tensor& pred, const Tensor& ref_pred, const Tensor& target, std::optional<Tensor> weight,
                       bool element_mean) {
  const Rows<3> rows({pred, target, ref_pred});
  const auto dtype = rows.arithmetic();
  weight = row_scalars(weight, dtype);
  const Tensor delta = new_vector(pred, rows.count, dtype);
  with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    const ElboDifference<T> formula{data_or_null<T>(weight), T(element_scale(element_mean, rows.size)),
                                    mutable_data<T>(delta)};
    Device::template rowwise<T>(formula, Groups::single(rows.count), rows);
  });
  return delta;
}

using LossOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, delta, error_slope, grad_pred

// One pass of an ELBO-difference loss: terms, deltas, slopes, and the gradient if asked for.
template <class Device, class T, class Link>
LossOutputs elbo_difference_loss(const Rows<3>& rows, const Groups& groups, std::optional<Tensor> weight,
                                 bool element_mean, int64_t reduction, double scale, bool with_grad, const Link& link) {
  const auto dtype = rows.arithmetic();
  const Tensor& pred = rows.tensors[0];
  weight = row_scalars(weight, dtype);
  const Tensor term = new_vector(pred, groups.count, dtype);
  const Tensor delta = new_vector(pred, groups.count, dtype);
  const Tensor error_slope = new_vector(pred, rows.count, dtype);
  const Tensor grad_pred =
      with_grad ? Device::new_output(rows, pred.scalar_type()) : new_vector(pred, 0, pred.scalar_type());
  const ElboDifferenceLoss<T, Link> formula{link,
                                            groups,
                                            data_or_null<T>(weight),
                                            T(element_scale(element_mean, rows.size)),
                                            T(scale),
                                            mutable_data<T>(term),
                                            mutable_data<T>(delta),
                                            mutable_data<T>(error_slope)};
  const Tensor loss = Device::template rowwise_loss<T>(formula, groups, rows, output_of(grad_pred, with_grad), term,
                                                       option<Reduction>(reduction));
  return {loss, delta, error_slope, grad_pred};
}

template <class Device>
LossOutputs ddo_loss(const Tensor& pred, const Tensor& ref_pred, const Tensor& target,
                     const std::optional<Tensor>& weight, bool element_mean, int64_t reduction, double scale,
                     bool with_grad, const Tensor& is_real, std::optional<Tensor> counts, std::optional<Tensor> alphas,
                     double alpha, double beta, int64_t mc_samples) {
  const Rows<3> rows({pred, target, ref_pred});
  const Groups groups = Groups::consecutive(rows.count, mc_samples);
  const Tensor real = made_contiguous(is_real);
  counts = row_scalars(counts, rows.arithmetic());
  alphas = row_scalars(alphas, rows.arithmetic());
  return with_arithmetic(rows.arithmetic(), [&](auto zero) {
    using T = decltype(zero);
    const auto flags = DdoLink<T>::template flags<Device>(real, counts, reduction);
    const DdoLink<T> link{flags.counts, T(alpha), T(beta), T(1.0 / static_cast<double>(mc_samples)),
                          data_or_null<T>(alphas)};
    return elbo_difference_loss<Device, T>(rows, groups, weight, element_mean, reduction, scale, with_grad, link);
  });
}

// A tensor as a link's member: the bytes of flags, or numbers in the arithmetic type.
template <class T>
struct TensorMember {
  const void* data;
  operator const uint8_t*() const { return static_cast<const uint8_t*>(data); }
  operator const T*() const { return static_cast<const T*>(data); }
};
template <class T> TensorMember<T> link_member(const Tensor& t) { return {t.const_data_ptr()}; }
template <class T> T link_member(double number) { return static_cast<T>(number); }
template <class T> int64_t link_member(int64_t option) { return option; }
template <class T> bool link_member(bool option) { return option; }

inline Tensor readable(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == ScalarType::Bool ? made_contiguous(t) : *row_scalars(t, dtype);
}
template <class Number>
Number readable(Number number, ScalarType) {
  return number;
}

// A loss over ELBO differences that is its link: the operator's own arguments are the link's members, in their order.
template <class Device, template <class> class Link, class... Own>
LossOutputs difference_loss(const Tensor& pred, const Tensor& ref_pred, const Tensor& target,
                            const std::optional<Tensor>& weight, bool element_mean, int64_t reduction, double scale,
                            bool with_grad, Own... own) {
  const Rows<3> rows({pred, target, ref_pred});
  ((own = readable(own, rows.arithmetic())), ...);
  return with_arithmetic(rows.arithmetic(), [&](auto zero) {
    using T = decltype(zero);
    const Link<T> link{link_member<T>(own)...};
    Groups groups = Groups::single(rows.count);
    if constexpr (Shares<Link<T>>) groups = link.groups(rows.count);
    return elbo_difference_loss<Device, T>(rows, groups, weight, element_mean, reduction, scale, with_grad, link);
  });
}

// Diffusion-KTO (arXiv 2404.04465): weight * (1 - sigmoid(+-beta (m - baseline))).
template <class T>
struct KtoLink {
  const uint8_t* is_desirable;
  const T* baseline;
  T beta, desirable_weight, undesirable_weight;

  FASTGEN_HD T term(int64_t row, T m, T* slope) const {
    const bool desirable = is_desirable[row] != 0;
    const T weight = desirable ? desirable_weight : undesirable_weight, rate = desirable ? beta : -beta;
    const T x = rate * (m - *baseline);
    *slope = -weight * rate * sigmoid(x) * sigmoid(-x);
    return weight * sigmoid(-x);
  }
};

// x / expm1(x) - 1 and its derivative. Both cancel near 0: there it is the series of the Bernoulli numbers B_2k / (2k)!.
template <class T>
FASTGEN_HD T odds(T x, T* slope) {
  if (std::abs(x) < T(0.3)) {
    const T y = x * x;
    const T b2 = T(1.0 / 12), b4 = T(-1.0 / 720), b6 = T(1.0 / 30240), b8 = T(-1.0 / 1209600), b10 = T(1.0 / 47900160),
            b12 = T(-691.0 / 1307674368000);
    *slope = T(-0.5) + x * (2 * b2 + y * (4 * b4 + y * (6 * b6 + y * (8 * b8 + y * (10 * b10 + y * 12 * b12)))));
    return T(-0.5) * x + y * (b2 + y * (b4 + y * (b6 + y * (b8 + y * (b10 + y * b12)))));
  }
  const T f = x / std::expm1(x);
  *slope = f * ((T(1) - f) - x) / x;
  return f - T(1);
}

// MaPO (arXiv 2406.06424) over pairs of errors: e_w - beta log sigmoid(timesteps (odds(s e_w) - odds(s e_l))).
template <class T>
struct MapoLoss {
  static constexpr int kStreams = 2, kSums = 2, kMapStreams = 2;
  struct Row {
    T scale, winner, loser;  // 1 and 0, or 0 and 1
  };
  Groups groups;
  const T* weight;
  T scale, term_scale, beta, error_scale, timesteps;
  T* term;         // [groups]
  T* error_slope;  // [rows]: d loss / d error_r

  FASTGEN_HD Row row(int64_t row, int64_t rank) const {
    const T winner = rank == 0 ? T(1) : T(0);
    return {weight ? weight[row] * scale : scale, winner, T(1) - winner};
  }
  FASTGEN_HD void accumulate(const Row& row, const T* v, T* sums) const {
    const T error = L2::value(v[0] - v[1]);
    sums[0] += row.winner * error;
    sums[1] += row.loser * error;
  }
  FASTGEN_HD Numbers<T, 2> epilogue(int64_t group, const T* sums) const {
    T winner_slope, loser_slope;
    const T winner = odds(error_scale * sums[0], &winner_slope), loser = odds(error_scale * sums[1], &loser_slope);
    const T x = timesteps * (loser - winner);
    const T rate = term_scale * beta * sigmoid(x) * timesteps * error_scale;
    term[group] = term_scale * (sums[0] + beta * softplus(x));
    const Numbers<T, 2> slopes{{term_scale - rate * winner_slope, rate * loser_slope}};
    for (int r = 0; r < 2; ++r) error_slope[groups.row(group, r)] = slopes[r];
    return slopes;
  }
  FASTGEN_HD T coefficient(int64_t, int64_t rank, const Row& row, const Numbers<T, 2>& slopes) const {
    return row.scale * (rank == 0 ? slopes[0] : slopes[1]);
  }
  FASTGEN_HD T map(const Row&, T coefficient, const T* v) const { return coefficient * L2::slope(v[0] - v[1]); }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor> mapo_loss(const Tensor& pred, const Tensor& target, std::optional<Tensor> weight,
                                             bool element_mean, int64_t reduction, double scale, bool with_grad,
                                             double beta, double error_scale, double timesteps) {
  const Rows<2> rows({pred, target});
  const auto dtype = rows.arithmetic();
  weight = row_scalars(weight, dtype);
  const Groups groups = Groups::halves(rows.count);
  const Tensor term = new_vector(pred, groups.count, dtype), error_slope = new_vector(pred, rows.count, dtype);
  const Tensor grad_pred =
      with_grad ? Device::new_output(rows, pred.scalar_type()) : new_vector(pred, 0, pred.scalar_type());
  return with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    const MapoLoss<T> formula{groups,         data_or_null<T>(weight),  T(element_scale(element_mean, rows.size)),
                              T(scale),       T(beta),                  T(error_scale),
                              T(timesteps),   mutable_data<T>(term),    mutable_data<T>(error_slope)};
    const Tensor loss = Device::template rowwise_loss<T>(formula, groups, rows, output_of(grad_pred, with_grad), term,
                                                         option<Reduction>(reduction));
    return std::tuple(loss, error_slope, grad_pred);
  });
}

template <class Device>
void register_elbo(torch::stable::detail::StableLibrary& m) {
  m.impl("elbo_error", TORCH_BOX(&elbo_error<Device>));
  m.impl("elbo_error_backward", TORCH_BOX(&elbo_error_backward<Device>));
  m.impl("l1_distance", TORCH_BOX(&l1_distance<Device>));
  m.impl("elbo_difference", TORCH_BOX(&elbo_difference<Device>));
  m.impl("ddo_loss", TORCH_BOX(&ddo_loss<Device>));
  m.impl("diffusion_dpo_loss", TORCH_BOX((&difference_loss<Device, PreferenceLink, double, int64_t, bool>)));
  m.impl("diffusion_kto_loss", TORCH_BOX((&difference_loss<Device, KtoLink, Tensor, Tensor, double, double, double>)));
  m.impl("mapo_loss", TORCH_BOX(&mapo_loss<Device>));
}

}  // namespace fastgen
