// The operators of the family elbo, for any device (csrc/operators/device.h says what that is).
#pragma once

#include <tuple>

#include "../formulas/elbo.h"
#include "device.h"
#include "options.h"

namespace fastgen {

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
    Device::template rowwise<T>(formula, Groups::single(rows.count), rows,
                                {with_grad ? grad_pred.mutable_data_ptr() : nullptr, pred.scalar_type()});
    return std::tuple(Device::template sum<T>(term), grad_pred);
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
                                 bool element_mean, bool reduce, bool with_grad, const Link& link) {
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
                                            mutable_data<T>(term),
                                            mutable_data<T>(delta),
                                            mutable_data<T>(error_slope)};
  Device::template rowwise<T>(formula, groups, rows,
                              {with_grad ? grad_pred.mutable_data_ptr() : nullptr, pred.scalar_type()});
  return {reduce ? Device::template sum<T>(term) : term, delta, error_slope, grad_pred};
}

template <class Device>
LossOutputs ddo_loss(const Tensor& pred, const Tensor& ref_pred, const Tensor& target,
                     const std::optional<Tensor>& weight, bool element_mean, int64_t reduction,
                     bool with_grad, const Tensor& is_real, std::optional<Tensor> counts, double alpha, double beta,
                     int64_t mc_samples) {
  const Rows<3> rows({pred, target, ref_pred});
  const Groups groups = Groups::consecutive(rows.count, mc_samples);
  const Tensor real = made_contiguous(is_real);
  counts = row_scalars(counts, rows.arithmetic());
  return with_arithmetic(rows.arithmetic(), [&](auto zero) {
    using T = decltype(zero);
    const bool mean = option<Reduction>(reduction) == Reduction::mean;
    std::optional<typename Device::template FlagCounts<T>> own_counts;
    if (mean && !counts) own_counts.emplace(real);
    const T* n = !mean ? nullptr : counts ? data_or_null<T>(counts) : own_counts->data();
    const DdoLink<T> link{flag_bytes(real), n, T(alpha), T(beta),
                          T(1.0 / static_cast<double>(mc_samples))};
    return elbo_difference_loss<Device, T>(rows, groups, weight, element_mean, option<Reduction>(reduction) != Reduction::none, with_grad, link);
  });
}

template <class Device>
LossOutputs diffusion_dpo_loss(const Tensor& pred, const Tensor& ref_pred, const Tensor& target,
                               const std::optional<Tensor>& weight, bool element_mean, int64_t reduction,
                               bool with_grad, double beta, int64_t kind) {
  const Rows<3> rows({pred, target, ref_pred});
  const Groups groups = Groups::halves(rows.count);
  const double scale = option<Reduction>(reduction) == Reduction::mean ? 1.0 / static_cast<double>(std::max<int64_t>(groups.count, 1)) : 1.0;
  return with_arithmetic(rows.arithmetic(), [&](auto zero) {
    using T = decltype(zero);
    const PreferenceLink<T> link{option<Preference>(kind), T(beta), T(scale)};
    return elbo_difference_loss<Device, T>(rows, groups, weight, element_mean, option<Reduction>(reduction) != Reduction::none, with_grad, link);
  });
}

template <class Device>
void register_elbo(torch::stable::detail::StableLibrary& m) {
  m.impl("elbo_error", TORCH_BOX(&elbo_error<Device>));
  m.impl("elbo_error_backward", TORCH_BOX(&elbo_error_backward<Device>));
  m.impl("l1_distance", TORCH_BOX(&l1_distance<Device>));
  m.impl("elbo_difference", TORCH_BOX(&elbo_difference<Device>));
  m.impl("ddo_loss", TORCH_BOX(&ddo_loss<Device>));
  m.impl("diffusion_dpo_loss", TORCH_BOX(&diffusion_dpo_loss<Device>));
}

}  // namespace fastgen
