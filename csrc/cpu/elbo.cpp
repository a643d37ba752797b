#include "../formulas/elbo.h"

#include <string>
#include <tuple>

#include "rowwise.h"

namespace fastgen::cpu {

namespace {

template <class F>
void with_penalty(const std::string& loss, const F& f) {
  if (loss == "l2") f(L2{});
  else if (loss == "l1") f(L1{});
  else f(Huber{});
}

Preference preference(const std::string& kind) {
  return kind == "sigmoid" ? Preference::sigmoid : kind == "ipo" ? Preference::ipo : Preference::hinge;
}

double element_scale(bool element_mean, int64_t size) { return element_mean ? 1.0 / static_cast<double>(size) : 1.0; }

}  // namespace

Tensor elbo_error(const Tensor& pred, const Tensor& target, std::optional<Tensor> weight, const std::string& loss,
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
      rowwise<T>(formula, Groups::single(rows.count), rows);
    });
  });
  return error;
}

Tensor elbo_error_backward(const Tensor& grad, const Tensor& pred, const Tensor& target, std::optional<Tensor> weight,
                           const std::string& loss, bool element_mean) {
  const Rows<2> rows({pred, target});
  const auto dtype = rows.arithmetic();
  weight = row_scalars(weight, dtype);
  const auto row_grad = row_scalars(grad, dtype);
  const Tensor grad_pred = rows.new_output(pred.scalar_type());
  with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_penalty(loss, [&](auto penalty) {
      const ElboErrorBackward<T, decltype(penalty)> formula{data_or_null<T>(row_grad), data_or_null<T>(weight),
                                                            T(element_scale(element_mean, rows.size))};
      rowwise<T>(formula, Groups::single(rows.count), rows, {grad_pred.mutable_data_ptr(), pred.scalar_type()});
    });
  });
  return grad_pred;
}

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
    rowwise<T>(formula, Groups::single(rows.count), rows);
  });
  return delta;
}

using LossOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, delta, error_slope, grad_pred

// One pass of an ELBO-difference loss: terms, deltas, slopes, and the gradient if asked for. `make_link` gets the
// arithmetic type's zero.
template <class MakeLink>
LossOutputs elbo_difference_loss(const Rows<3>& rows, const Groups& groups, std::optional<Tensor> weight,
                                 bool element_mean, bool reduce, bool with_grad, const MakeLink& make_link) {
  const auto dtype = rows.arithmetic();
  const Tensor& pred = rows.tensors[0];
  weight = row_scalars(weight, dtype);
  Tensor term = new_vector(pred, groups.count, dtype);
  const Tensor delta = new_vector(pred, groups.count, dtype);
  const Tensor error_slope = new_vector(pred, rows.count, dtype);
  const Tensor grad_pred = with_grad ? rows.new_output(pred.scalar_type()) : new_vector(pred, 0, pred.scalar_type());
  const Output out{with_grad ? grad_pred.mutable_data_ptr() : nullptr, pred.scalar_type()};
  with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto link = make_link(zero);
    const ElboDifferenceLoss<T, std::decay_t<decltype(link)>> formula{
        link, data_or_null<T>(weight), T(element_scale(element_mean, rows.size)), mutable_data<T>(term),
        mutable_data<T>(delta), mutable_data<T>(error_slope)};
    rowwise<T>(formula, groups, rows, out);
    if (reduce) {
      double sum = 0;
      for (int64_t g = 0; g < groups.count; ++g) sum += static_cast<double>(formula.term[g]);
      term = new_scalar(pred, dtype);
      *mutable_data<T>(term) = static_cast<T>(sum);
    }
  });
  return {term, delta, error_slope, grad_pred};
}

LossOutputs ddo_loss(const Tensor& pred, const Tensor& ref_pred, const Tensor& target,
                     const std::optional<Tensor>& weight, bool element_mean, const std::string& reduction,
                     bool with_grad, const Tensor& is_real, std::optional<Tensor> counts, double alpha, double beta,
                     int64_t mc_samples) {
  const Rows<3> rows({pred, target, ref_pred});
  const Groups groups = Groups::consecutive(rows.count, mc_samples);
  const Tensor real = made_contiguous(is_real);
  const bool* flags = static_cast<const bool*>(real.const_data_ptr());
  counts = row_scalars(counts, rows.arithmetic());
  double own_counts[2] = {0, 0};
  for (int64_t g = 0; g < groups.count; ++g) own_counts[flags[g] ? 0 : 1] += 1;
  float counts_float[2] = {static_cast<float>(own_counts[0]), static_cast<float>(own_counts[1])};
  return elbo_difference_loss(
      rows, groups, weight, element_mean, reduction != "none", with_grad, [&](auto zero) -> DdoLink<decltype(zero)> {
        using T = decltype(zero);
        const T* n = nullptr;
        if (reduction == "mean") {
          if (counts) n = data_or_null<T>(counts);
          else if constexpr (std::is_same_v<T, double>) n = own_counts;
          else n = counts_float;
        }
        return {flags, n, T(alpha), T(beta), T(1.0 / static_cast<double>(mc_samples))};
      });
}

LossOutputs diffusion_dpo_loss(const Tensor& pred, const Tensor& ref_pred, const Tensor& target,
                               const std::optional<Tensor>& weight, bool element_mean, const std::string& reduction,
                               bool with_grad, double beta, const std::string& kind) {
  const Rows<3> rows({pred, target, ref_pred});
  const Groups groups = Groups::halves(rows.count);
  const double scale = reduction == "mean" ? 1.0 / static_cast<double>(std::max<int64_t>(groups.count, 1)) : 1.0;
  return elbo_difference_loss(rows, groups, weight, element_mean, reduction != "none", with_grad, [&](auto zero) {
    using T = decltype(zero);
    return PreferenceLink<T>{preference(kind), T(beta), T(scale)};
  });
}

}  // namespace fastgen::cpu

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("elbo_error", TORCH_BOX(&fastgen::cpu::elbo_error));
  m.impl("elbo_error_backward", TORCH_BOX(&fastgen::cpu::elbo_error_backward));
  m.impl("elbo_difference", TORCH_BOX(&fastgen::cpu::elbo_difference));
  m.impl("ddo_loss", TORCH_BOX(&fastgen::cpu::ddo_loss));
  m.impl("diffusion_dpo_loss", TORCH_BOX(&fastgen::cpu::diffusion_dpo_loss));
}
