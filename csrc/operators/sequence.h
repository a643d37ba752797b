// The operators of the family sequence, for any device (csrc/operators/device.h says what that is). Besides, a device
// of sweeps has
//
//   // Runs a formula of csrc/formulas/sequence.h over rows of logits, writing to `out`, [..., `width`], if it has data.
//   template <class T, class F, int N>
//   static void sweep(const F& formula, const TokenRows<N>& rows, Output out, int64_t width);
//   // A contiguous output of the shape of `logits`.
//   static Tensor new_logits(const Tensor& logits);
#pragma once

#include <tuple>

#include "../formulas/sequence.h"
#include "../token_rows.h"
#include "device.h"
#include "options.h"

namespace fastgen {

template <class T>
Tokens<T> tokens_of(const Tensor& contiguous_tokens, const Tensor& logits, int64_t ignore_index) {
  return {static_cast<const int64_t*>(contiguous_tokens.const_data_ptr()), ignore_index, logits.size(-1)};
}

template <class Device>
std::tuple<Tensor, Tensor> token_logprob(const Tensor& logits, const Tensor& tokens, double temperature,
                                         int64_t ignore_index) {
  const TokenRows<1> rows({logits});
  const auto dtype = rows.arithmetic();
  const Tensor indices = made_contiguous(tokens);
  const Tensor logprob = new_per_row(logits, dtype), stats = new_per_row(logits, dtype, 2);
  with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* saved = mutable_data<T>(stats);
    const TokenLogprob<T> formula{tokens_of<T>(indices, logits, ignore_index), T(1 / temperature),
                                  mutable_data<T>(logprob), {saved, saved + rows.count}};
    Device::template sweep<T>(formula, rows, Output{}, 0);
  });
  return {logprob, stats};
}

template <class Device>
Tensor token_logprob_backward(const Tensor& grad, const Tensor& logits, const Tensor& tokens, const Tensor& stats,
                              double temperature, int64_t ignore_index) {
  const TokenRows<1> rows({logits});
  const auto dtype = rows.arithmetic();
  const Tensor indices = made_contiguous(tokens), saved = made_contiguous(stats);
  const auto row_grad = row_scalars(grad, dtype);
  const Tensor grad_logits = Device::new_logits(logits);
  with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* s = static_cast<const T*>(saved.const_data_ptr());
    const TokenLogprobBackward<T> formula{tokens_of<T>(indices, logits, ignore_index), T(1 / temperature),
                                          data_or_null<T>(row_grad), {s, s + rows.count}};
    Device::template sweep<T>(formula, rows, Output{grad_logits.mutable_data_ptr(), logits.scalar_type()},
                              logits.size(-1));
  });
  return grad_logits;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> sequence_ddo_loss(const Tensor& logprob, const Tensor& ref_logprob,
                                                     const Tensor& is_real, std::optional<Tensor> counts, double alpha,
                                                     double beta, double scale, int64_t reduction) {
  const Rows<2> rows({logprob, ref_logprob});
  const auto dtype = rows.arithmetic();
  const Tensor real = made_contiguous(is_real);
  counts = row_scalars(counts, dtype);
  const Tensor term = new_vector(logprob, rows.count, dtype), delta = new_vector(logprob, rows.count, dtype);
  const Tensor slope = new_vector(logprob, rows.count, dtype);
  const Tensor loss = with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    std::optional<typename Device::template FlagCounts<T>> own_counts;
    const bool mean = option<Reduction>(reduction) == Reduction::mean;
    if (mean && !counts) own_counts.emplace(real);
    const T* n = !mean ? nullptr : counts ? data_or_null<T>(counts) : own_counts->data();
    const SequenceDdoLoss<T> formula{{flag_bytes(real), n, T(alpha), T(beta), T(1)},
                                     T(scale),
                                     mutable_data<T>(term),
                                     mutable_data<T>(delta),
                                     mutable_data<T>(slope)};
    Device::template rowwise<T>(formula, Groups::single(rows.count), rows);
    return option<Reduction>(reduction) == Reduction::none ? term : Device::template sum<T>(term);
  });
  return {loss, delta, slope};
}

template <class F>
void with_divergence(double beta, const F& f) {
  if (beta == 0) f(std::integral_constant<Divergence, Divergence::forward>{});
  else if (beta == 1) f(std::integral_constant<Divergence, Divergence::reverse>{});
  else f(std::integral_constant<Divergence, Divergence::mixed>{});
}

template <class T>
JsdStats<T> jsd_stats(const Tensor& stats, int64_t rows) {
  T* s = mutable_data<T>(stats);
  return {{s, s + rows}, {s + 2 * rows, s + 3 * rows}, s + 4 * rows};
}

inline const int64_t* labels_or_null(const std::optional<Tensor>& labels) {
  return labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> generalized_jsd(const Tensor& student, const Tensor& teacher,
                                                   std::optional<Tensor> labels, const std::optional<Tensor>& scale,
                                                   double beta, double temperature, int64_t ignore_index, int64_t reduction,
                                                   bool with_grad) {
  const TokenRows<2> rows({student, teacher});
  const auto dtype = rows.arithmetic();
  if (labels) labels = made_contiguous(*labels);
  const auto factor = row_scalars(scale, dtype);
  const Tensor loss = new_per_row(student, dtype), stats = new_per_row(student, dtype, 5);
  const Tensor grad = with_grad ? Device::new_logits(student) : new_vector(student, 0, student.scalar_type());
  return with_arithmetic(dtype, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    with_divergence(beta, [&](auto divergence) {
      constexpr Divergence D = decltype(divergence)::value;
      const T inverse = T(1 / temperature);
      const GeneralizedJsd<T, D> formula{{T(beta), T(1 - beta), inverse},        inverse,
                                         labels_or_null(labels),    ignore_index,
                                         data_or_null<T>(factor),   mutable_data<T>(loss),
                                         jsd_stats<T>(stats, rows.count)};
      Device::template sweep<T>(formula, rows,
                                Output{with_grad ? grad.mutable_data_ptr() : nullptr, student.scalar_type()},
                                student.size(-1));
    });
    return {option<Reduction>(reduction) == Reduction::none ? loss : Device::template sum<T>(loss), stats, grad};
  });
}

template <class Device>
Tensor generalized_jsd_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                std::optional<Tensor> labels, const Tensor& stats, double beta, double temperature,
                                int64_t ignore_index) {
  const TokenRows<2> rows({student, teacher});
  const auto dtype = rows.arithmetic();
  if (labels) labels = made_contiguous(*labels);
  const auto row_grad = row_scalars(grad, dtype);
  const Tensor saved = made_contiguous(stats);
  const Tensor grad_student = Device::new_logits(student);
  with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_divergence(beta, [&](auto divergence) {
      constexpr Divergence D = decltype(divergence)::value;
      const T inverse = T(1 / temperature);
      const GeneralizedJsdBackward<T, D> formula{{T(beta), T(1 - beta), inverse},         inverse,
                                                 labels_or_null(labels),     ignore_index,
                                                 data_or_null<T>(row_grad),  jsd_stats<T>(saved, rows.count)};
      Device::template sweep<T>(formula, rows, Output{grad_student.mutable_data_ptr(), student.scalar_type()},
                                student.size(-1));
    });
  });
  return grad_student;
}

template <class Device>
void register_sequence(torch::stable::detail::StableLibrary& m) {
  m.impl("token_logprob", TORCH_BOX(&token_logprob<Device>));
  m.impl("token_logprob_backward", TORCH_BOX(&token_logprob_backward<Device>));
  m.impl("sequence_ddo_loss", TORCH_BOX(&sequence_ddo_loss<Device>));
  m.impl("generalized_jsd", TORCH_BOX(&generalized_jsd<Device>));
  m.impl("generalized_jsd_backward", TORCH_BOX(&generalized_jsd_backward<Device>));
}

}  // namespace fastgen
