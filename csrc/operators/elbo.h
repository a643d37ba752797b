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
  Device::template rowwise<T>(formula, groups, rows,
                              {with_grad ? grad_pred.mutable_data_ptr() : nullptr, pred.scalar_type()});
  const bool reduce = option<Reduction>(reduction) != Reduction::none;
  return {reduce ? Device::template sum<T>(term) : term, delta, error_slope, grad_pred};
}

template <class Device>
LossOutputs ddo_loss(const Tensor& pred, const Tensor& ref_pred, const Tensor& target,
                     const std::optional<Tensor>& weight, bool element_mean, int64_t reduction, double scale,
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
    const DdoLink<T> link{flag_bytes(real), n, T(alpha), T(beta), T(1.0 / static_cast<double>(mc_samples))};
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
    if constexpr (Shares<Link<T>>) groups = Link<T>::groups(rows.count);
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

template <class Device>
void register_elbo(torch::stable::detail::StableLibrary& m) {
  m.impl("elbo_error", TORCH_BOX(&elbo_error<Device>));
  m.impl("elbo_error_backward", TORCH_BOX(&elbo_error_backward<Device>));
  m.impl("l1_distance", TORCH_BOX(&l1_distance<Device>));
  m.impl("elbo_difference", TORCH_BOX(&elbo_difference<Device>));
  m.impl("ddo_loss", TORCH_BOX(&ddo_loss<Device>));
  m.impl("diffusion_dpo_loss", TORCH_BOX((&difference_loss<Device, PreferenceLink, double, int64_t>)));
  m.impl("diffusion_kto_loss", TORCH_BOX((&difference_loss<Device, KtoLink, Tensor, Tensor, double, double, double>)));
}

}  // namespace fastgen
