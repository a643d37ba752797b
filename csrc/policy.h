// Post-training by reward: DiffusionNFT (arXiv 2509.16117) and the stochastic steps of Flow-GRPO (arXiv 2505.05470).
#pragma once

#include <tuple>

#include "prediction.h"
#include "runtime/device.h"
#include "runtime/half.h"
#include "runtime/options.h"

namespace fastgen {

// The two branches of a row, x0± = a x_t + b (old ± beta (pred - old)), by their errors.
// Streams: pred, old_pred, x_t, x0, [ref_pred].
template <class T, bool kRef>
struct NftBranches {
  static constexpr int kStreams = 4 + kRef, kMapStreams = kStreams;
  struct Row {
    T scale;  // 1/D
    Mixture<T> x0;
  };
  const T *alpha, *sigma;
  Prediction type;
  T beta, mean;

  FASTGEN_HD Row row(int64_t row) const { return {mean, x0_from(type, alpha[row], sigma[row])}; }
  FASTGEN_HD void errors(const Row& row, const T* v, T* plus, T* minus) const {
    const T old = row.x0(v[2], v[1]) - v[3], step = row.x0.b * (beta * (v[0] - v[1]));
    *plus = old + step;
    *minus = old - step;
  }
  // `slopes`: of |x0+ - x0|² / 2 and |x0- - x0|² / 2 by beta, and of |pred - ref_pred|² / 2; all means.
  FASTGEN_HD Numbers<T, 3> coefficient(const Row& row, const Numbers<T, 3>& slopes) const {
    return {{row.scale * row.x0.b * slopes[0], row.scale * row.x0.b * slopes[1], row.scale * slopes[2]}};
  }
  FASTGEN_HD T map(const Row& row, const Numbers<T, 3>& coefficients, const T* v) const {
    T plus, minus;
    errors(row, v, &plus, &minus);
    const T gradient = coefficients[0] * plus + coefficients[1] * minus;
    if constexpr (kRef) return gradient + coefficients[2] * (v[0] - v[4]);
    else return gradient;
  }
};

// scale (r/beta mean (x0+ - x0)²/n+ + (1-r)/beta mean (x0- - x0)²/n-) + kl_weight mean (pred - ref_pred)², with
// n = max(mean |x0± - x0|, least), which has no gradient.
template <class T, bool kRef>
struct NftLoss {
  using Branches = NftBranches<T, kRef>;
  using Row = typename Branches::Row;
  static constexpr int kStreams = Branches::kStreams, kSums = 5, kMapStreams = Branches::kMapStreams;
  static constexpr int kStats = 5;  // rows of `stats`: both branches' normalised errors, |pred - ref|², both n
  Branches branches;
  const T* r;
  T scale, kl_weight, least, term_scale;
  T* term;    // [rows]
  T* slopes;  // [3, rows]
  T* stats;   // [kStats, rows]
  int64_t rows;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return branches.row(row); }
  FASTGEN_HD void accumulate(const Row& row, const T* v, T* sums) const {
    T plus, minus;
    branches.errors(row, v, &plus, &minus);
    sums[0] += std::abs(plus);
    sums[1] += std::abs(minus);
    sums[2] += plus * plus;
    sums[3] += minus * minus;
    if constexpr (kRef) sums[4] += (v[0] - v[4]) * (v[0] - v[4]);
  }
  FASTGEN_HD Numbers<T, 3> epilogue(int64_t row, const T* sums) const {
    const T n_plus = sums[0] < least ? least : sums[0], n_minus = sums[1] < least ? least : sums[1];  // NaN stays NaN
    const T plus = sums[2] / n_plus, minus = sums[3] / n_minus, good = r[row], bad = T(1) - good;
    term[row] = term_scale * (scale * ((good * plus + bad * minus) / branches.beta) + kl_weight * sums[4]);
    const T values[kStats] = {plus, minus, sums[4], n_plus, n_minus};
    for (int k = 0; k < kStats; ++k) stats[k * rows + row] = values[k];
    const T twice = T(2) * term_scale;
    const Numbers<T, 3> own{{twice * scale * good / n_plus, -twice * scale * bad / n_minus, twice * kl_weight}};
    for (int k = 0; k < 3; ++k) slopes[k * rows + row] = own[k];
    return own;
  }
  FASTGEN_HD Numbers<T, 3> coefficient(int64_t, int64_t, const Row& row, const Numbers<T, 3>& slopes) const {
    return branches.coefficient(row, slopes);
  }
  FASTGEN_HD T map(const Row& row, const Numbers<T, 3>& coefficients, const T* v) const {
    return branches.map(row, coefficients, v);
  }
};

// The gradient again: `grad` [3, rows] holds the slopes times the loss's gradient.
template <class T, bool kRef>
struct NftBackward {
  using Branches = NftBranches<T, kRef>;
  using Row = typename Branches::Row;
  static constexpr int kStreams = Branches::kStreams, kSums = 0, kMapStreams = Branches::kMapStreams;
  Branches branches;
  const T* grad;
  int64_t rows;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return branches.row(row); }
  FASTGEN_HD Numbers<T, 3> coefficient(int64_t row, int64_t, const Row& constants, T) const {
    return branches.coefficient(constants, {{grad[row], grad[rows + row], grad[2 * rows + row]}});
  }
  FASTGEN_HD T map(const Row& row, const Numbers<T, 3>& coefficients, const T* v) const {
    return branches.map(row, coefficients, v);
  }
};

namespace policy {

struct NftCall {
  const Tensor &pred, &old_pred, &x_t, &x0;
  const std::optional<Tensor>& ref_pred;
  const Tensor &alpha_t, &sigma_t;
  int64_t type;
  double beta;

  // Calls use(branches, rows) with what the loss and its backward share.
  template <class Use>
  void with(const Use& use) const {
    const auto arithmetic = arithmetic_of({pred, old_pred, x_t, x0, ref_pred}, pred.scalar_type());
    const auto alpha = row_scalars(alpha_t, arithmetic), sigma = row_scalars(sigma_t, arithmetic);
    with_arithmetic(arithmetic, [&](auto zero) {
      with_flag(ref_pred.has_value(), [&](auto has_ref) {
        using T = decltype(zero);
        using Branches = NftBranches<T, has_ref>;
        const Rows<Branches::kStreams> rows(present<Branches::kStreams>({pred, old_pred, x_t, x0, ref_pred}));
        const Branches branches{data_or_null<T>(alpha), data_or_null<T>(sigma), option<Prediction>(type), T(beta),
                                T(1.0 / static_cast<double>(rows.size))};
        use(branches, rows, arithmetic, zero, has_ref);
      });
    });
  }
};

}  // namespace policy

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> diffusion_nft_loss(
    const Tensor& pred, const Tensor& old_pred, const Tensor& x_t, const Tensor& x0,
    const std::optional<Tensor>& ref_pred, const Tensor& alpha_t, const Tensor& sigma_t, int64_t type, double beta,
    const Tensor& r, double loss_scale, double kl_weight, double least, int64_t reduction, double scale,
    bool with_grad) {
  std::tuple<Tensor, Tensor, Tensor, Tensor> out;
  const auto dtype = pred.scalar_type();
  policy::NftCall{pred, old_pred, x_t, x0, ref_pred, alpha_t, sigma_t, type, beta}.with(
      [&](const auto& branches, const auto& rows, ScalarType arithmetic, auto zero, auto has_ref) {
        using T = decltype(zero);
        using Formula = NftLoss<T, has_ref>;
        const auto chances = row_scalars(r, arithmetic);
        const Tensor term = new_vector(pred, rows.count, arithmetic);
        const Tensor slopes = new_matrix(pred, 3, rows.count, arithmetic);
        const Tensor stats = new_matrix(pred, Formula::kStats, rows.count, arithmetic);
        const Tensor grad = with_grad ? Device::new_output(rows, dtype) : new_vector(pred, 0, dtype);
        const Formula formula{branches,
                              data_or_null<T>(chances),
                              T(loss_scale),
                              T(kl_weight),
                              T(least),
                              T(scale),
                              mutable_data<T>(term),
                              mutable_data<T>(slopes),
                              mutable_data<T>(stats),
                              rows.count};
        const Tensor loss =
            Device::template rowwise_loss<T>(formula, Groups::single(rows.count), rows, output_of(grad, with_grad),
                                             term, option<Reduction>(reduction));
        out = {loss, slopes, stats, grad};
      });
  return out;
}

template <class Device>
Tensor diffusion_nft_loss_backward(const Tensor& row_grad, const Tensor& pred, const Tensor& old_pred,
                                   const Tensor& x_t, const Tensor& x0, const std::optional<Tensor>& ref_pred,
                                   const Tensor& alpha_t, const Tensor& sigma_t, int64_t type, double beta) {
  Tensor grad;
  policy::NftCall{pred, old_pred, x_t, x0, ref_pred, alpha_t, sigma_t, type, beta}.with(
      [&](const auto& branches, const auto& rows, ScalarType arithmetic, auto zero, auto has_ref) {
        using T = decltype(zero);
        const auto slopes = row_scalars(row_grad, arithmetic);
        grad = Device::new_output(rows, pred.scalar_type());
        Device::template rowwise<T>(NftBackward<T, has_ref>{branches, data_or_null<T>(slopes), rows.count},
                                    Groups::single(rows.count), rows, {grad.mutable_data_ptr(), pred.scalar_type()});
      });
  return grad;
}

// What both formulas of a step share: mean = k_x x_t + k_v pred, and the log-probability of a sample, normal around it,
// an element. The streams are pred, x_t, and one that the sample comes from.
template <class T>
struct FlowMean {
  static constexpr int kStreams = 3, kSums = 1;
  static constexpr bool kMapsAtOnce = true;
  struct Row {
    T scale, k_x, k_v, std;
  };
  const T *k_x, *k_v, *std;
  T share;      // 1/D
  T* log_prob;  // [rows]

  FASTGEN_HD Row row(int64_t row, int64_t) const { return {share, k_x[row], k_v[row], std[row]}; }
  FASTGEN_HD T map(const Row& row, T, const T* v) const { return row.k_x * v[1] + row.k_v * v[0]; }
  FASTGEN_HD T epilogue(int64_t row, const T* sums) const {
    const T s = std[row], half_log_2_pi = T(0.91893853320467274178);
    log_prob[row] = -sums[0] / (T(2) * s * s) - std::log(s) - half_log_2_pi;
    return T(0);
  }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row&, T) const { return T(0); }
};

// A step whose sample is given: the third stream.
template <class T>
struct FlowStep : FlowMean<T> {
  using typename FlowMean<T>::Row;
  static constexpr int kMapStreams = 2;

  FASTGEN_HD void accumulate(const Row& row, const T* v, T* sums) const {
    const T error = v[2] - this->map(row, T(0), v);
    sums[0] += error * error;
  }
};

// A step that draws its sample, mean + std noise, as the second output; the third stream is the noise. The
// log-probability is that of the sample as its dtype keeps it.
template <class T, ScalarType kDtype>
struct FlowDraw : FlowMean<T> {
  using typename FlowMean<T>::Row;
  static constexpr int kMapStreams = 3;

  FASTGEN_HD T second(const Row& row, const T* v) const { return this->map(row, T(0), v) + row.std * v[2]; }
  FASTGEN_HD void accumulate(const Row& row, const T* v, T* sums) const {
    const T error = as_stored<kDtype>(second(row, v)) - this->map(row, T(0), v);
    sums[0] += error * error;
  }
};

// The gradient with respect to pred: k_v (grad_log_prob (sample - mean)/(std² D) + grad_mean).
// Streams: sample, mean, [grad_mean].
template <class T, bool kMean>
struct FlowStepBackward {
  static constexpr int kStreams = 2 + kMean, kSums = 0, kMapStreams = kStreams;
  struct Row {
    T error, k_v;
  };
  const T *grad, *k_v, *std;
  T share;

  FASTGEN_HD Row row(int64_t row, int64_t) const {
    return {k_v[row] * (grad[row] * share / (std[row] * std[row])), k_v[row]};
  }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row&, T) const { return T(0); }
  FASTGEN_HD T map(const Row& row, T, const T* v) const {
    const T gradient = row.error * (v[0] - v[1]);
    if constexpr (kMean) return gradient + row.k_v * v[2];
    else return gradient;
  }
};

namespace policy {

struct FlowCall {
  const Tensor &k_x, &k_v, &std;

  // Calls use(a FlowMean, a number of the arithmetic type, the output for the mean) and returns mean and log_prob.
  template <class Device, class Use>
  std::tuple<Tensor, Tensor> run(const Rows<3>& rows, const Use& use) const {
    const auto arithmetic = rows.arithmetic();
    const auto by_x = row_scalars(k_x, arithmetic), by_v = row_scalars(k_v, arithmetic),
               deviation = row_scalars(std, arithmetic);
    const Tensor log_prob = new_vector(rows.tensors[0], rows.count, arithmetic);
    const Tensor mean = Device::new_output(rows, arithmetic);
    with_arithmetic(arithmetic, [&](auto zero) {
      using T = decltype(zero);
      use(FlowMean<T>{data_or_null<T>(by_x), data_or_null<T>(by_v), data_or_null<T>(deviation),
                      T(1.0 / static_cast<double>(rows.size)), mutable_data<T>(log_prob)},
          zero, Output{mean.mutable_data_ptr(), arithmetic});
    });
    return {mean, log_prob};
  }
};

}  // namespace policy

template <class Device>
std::tuple<Tensor, Tensor> flow_sde_step(const Tensor& pred, const Tensor& x_t, const Tensor& sample,
                                         const Tensor& k_x, const Tensor& k_v, const Tensor& std) {
  const Rows<3> rows({pred, x_t, sample});
  return policy::FlowCall{k_x, k_v, std}.run<Device>(rows, [&](const auto& mean, auto zero, const Output& out) {
    using T = decltype(zero);
    Device::template rowwise<T>(FlowStep<T>{mean}, Groups::single(rows.count), rows, out);
  });
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> flow_sde_draw(const Tensor& x_t, const Tensor& pred, const Tensor& noise,
                                                 const Tensor& k_x, const Tensor& k_v, const Tensor& std) {
  const Rows<3> rows({pred, x_t, noise});
  const auto dtype = x_t.scalar_type();
  const Tensor sample = Device::new_output(rows, dtype);
  const auto [mean, log_prob] = policy::FlowCall{k_x, k_v, std}.run<Device>(
      rows, [&](const auto& of, auto zero, const Output& out) {
        using T = decltype(zero);
        with_dtype(dtype, [&](auto stored) {
          Device::template rowwise<T>(FlowDraw<T, stored>{of}, Groups::single(rows.count), rows, out,
                                      {sample.mutable_data_ptr(), dtype});
        });
      });
  return {sample, mean, log_prob};
}

template <class Device>
Tensor flow_sde_step_backward(const Tensor& grad, const Tensor& sample, const Tensor& mean,
                              const std::optional<Tensor>& grad_mean, const Tensor& k_v, const Tensor& std,
                              ScalarType dtype) {
  const auto arithmetic = arithmetic_of({sample, mean, grad_mean}, dtype);
  const auto row_grad = row_scalars(grad, arithmetic), by_v = row_scalars(k_v, arithmetic),
             deviation = row_scalars(std, arithmetic);
  Tensor out;
  with_arithmetic(arithmetic, [&](auto zero) {
    with_flag(grad_mean.has_value(), [&](auto has_mean) {
      using T = decltype(zero);
      using Formula = FlowStepBackward<T, has_mean>;
      const Rows<Formula::kStreams> rows(present<Formula::kStreams>({sample, mean, grad_mean}));
      out = Device::new_output(rows, dtype);
      const Formula formula{data_or_null<T>(row_grad), data_or_null<T>(by_v), data_or_null<T>(deviation),
                            T(1.0 / static_cast<double>(rows.size))};
      Device::template rowwise<T>(formula, Groups::single(rows.count), rows, {out.mutable_data_ptr(), dtype});
    });
  });
  return out;
}

template <class Device>
void register_policy(torch::stable::detail::StableLibrary& m) {
  m.impl("diffusion_nft_loss", TORCH_BOX(&diffusion_nft_loss<Device>));
  m.impl("diffusion_nft_loss_backward", TORCH_BOX(&diffusion_nft_loss_backward<Device>));
  m.impl("flow_sde_step", TORCH_BOX(&flow_sde_step<Device>));
  m.impl("flow_sde_draw", TORCH_BOX(&flow_sde_draw<Device>));
  m.impl("flow_sde_step_backward", TORCH_BOX(&flow_sde_step_backward<Device>));
}

}  // namespace fastgen
