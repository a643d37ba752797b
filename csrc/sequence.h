// Losses over rows of logits.
#pragma once

#include <tuple>

#include "elbo.h"
#include "runtime/device.h"
#include "runtime/options.h"
#include "runtime/token_rows.h"
#include "skeleton/exp.h"

namespace fastgen {

template <class T>
struct Tokens {
  const int64_t* token;
  int64_t ignore_index, vocabulary;

  FASTGEN_HD bool ignored(int64_t row) const { return token[row] == ignore_index; }
  FASTGEN_HD bool inside(int64_t row) const { return token[row] >= 0 && token[row] < vocabulary; }
};

// logprob[row] = (v_token - max) / temperature - log sum. By way of halves, as a difference of logits may be beyond all
// numbers where over the temperature it is not.
template <class T>
struct TokenLogprob {
  static constexpr int kStreams = 1, kSums = 0, kParts = 0;
  static constexpr bool kNormalizes = true;
  using Row = Softmax<T>;
  Tokens<T> tokens;
  T inverse_temperature;
  T* logprob;
  Softmax<T*> saved;

  FASTGEN_HD bool ignored(int64_t row) const { return tokens.ignored(row); }
  FASTGEN_HD void ignore(int64_t row) const { logprob[row] = saved.max[row] = saved.sum[row] = T(0); }
  FASTGEN_HD Row row(int64_t, const Softmax<T>* streams) const { return streams[0]; }
  FASTGEN_HD void epilogue(int64_t row, Row& constants, const T*) const {
    saved.max[row] = constants.max, saved.sum[row] = constants.sum;
    if (!tokens.inside(row)) logprob[row] = static_cast<T>(NAN);
  }
  FASTGEN_HD int64_t picked(int64_t row) const { return tokens.token[row]; }
  FASTGEN_HD void pick(int64_t row, const Row& constants, T v) const {
    const T half = v * T(0.5) - base_of(constants.max) * T(0.5);
    logprob[row] = half * inverse_temperature * T(2) - std::log(constants.sum);
  }
};

// grad[row] * (onehot - softmax) / temperature. `elsewhere`: the vocabulary is divided, and a row's token may be among the
// columns of another rank.
template <class T>
struct TokenLogprobBackward {
  static constexpr int kStreams = 1, kSums = 0, kParts = 1;
  static constexpr bool kNormalizes = false;
  struct Row {
    Origin<T> origin;
    T max, coefficient, share, log_sum;
  };
  Tokens<T> tokens;
  T inverse_temperature, scale;  // scale: 1 / temperature to the device's base
  const T* grad;
  Softmax<const T*> saved;
  bool elsewhere;

  FASTGEN_HD bool ignored(int64_t row) const { return tokens.ignored(row) || !(elsewhere || tokens.inside(row)); }
  FASTGEN_HD void ignore(int64_t) const {}
  FASTGEN_HD Row row(int64_t row, const Softmax<T>*) const {
    const T coefficient = grad[row] * inverse_temperature, sum = saved.sum[row];
    const T max = base_of(saved.max[row]);
    const Origin<T> origin(max, scale);
    return {origin, max, coefficient, -coefficient / sum * origin.factor(max), std::log(sum)};
  }
  FASTGEN_HD void element(const Row& row, const T* v, T* parts, T*) const {
    parts[0] = Base::power(row.origin.from(v[0]));
  }
  FASTGEN_HD void epilogue(int64_t, Row&, const T*) const {}
  FASTGEN_HD T map(const Row& row, const T* parts) const { return row.share * parts[0]; }
  FASTGEN_HD int64_t picked(int64_t row) const { return tokens.token[row]; }
  FASTGEN_HD T map_picked(const Row& row, T v) const {
    return -row.coefficient * exponential((v - row.max) * inverse_temperature - row.log_sum).minus_one;
  }
};

// DDO over sequences: delta[i] = Σ_t logprob - ref_logprob. A row-wise formula (formula.h), not a sweep.
template <class T>
struct SequenceDdoLoss {
  static constexpr int kStreams = 2, kSums = 1, kMapStreams = 0;
  using Row = ScaledRow<T>;
  DdoLink<T> link;
  T scale;
  T* term;
  T* delta;
  T* slope;  // d term / d delta

  FASTGEN_HD Row row(int64_t, int64_t) const { return {T(1)}; }
  FASTGEN_HD void accumulate(const Row&, const T* v, T* sums) const { sums[0] += v[0] - v[1]; }
  FASTGEN_HD T epilogue(int64_t group, const T* sums) const {
    T s;
    delta[group] = sums[0];
    term[group] = scale * link.term(group, sums[0], &s);
    return slope[group] = scale * s;
  }
  FASTGEN_HD FlagCounts<T>& flag_counts() { return link.flag_counts(); }
};

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
                              double temperature, int64_t ignore_index, bool elsewhere) {
  const TokenRows<1> rows({logits});
  const auto dtype = rows.arithmetic();
  const Tensor indices = made_contiguous(tokens), saved = made_contiguous(stats);
  const auto row_grad = row_scalars(grad, dtype);
  const Tensor grad_logits = Device::new_logits(logits);
  with_arithmetic(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* s = static_cast<const T*>(saved.const_data_ptr());
    const TokenLogprobBackward<T> formula{tokens_of<T>(indices, logits, ignore_index), T(1 / temperature),
                                          Base::scale(T(1 / temperature)), data_or_null<T>(row_grad),
                                          {s, s + rows.count}, elsewhere};
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
    const auto flags = DdoLink<T>::template flags<Device>(real, counts, reduction);
    const SequenceDdoLoss<T> formula{{flags.counts, T(alpha), T(beta), T(1)},
                                     T(scale),
                                     mutable_data<T>(term),
                                     mutable_data<T>(delta),
                                     mutable_data<T>(slope)};
    return Device::template rowwise_loss<T>(formula, Groups::single(rows.count), rows, Output{}, term,
                                            option<Reduction>(reduction));
  });
  return {loss, delta, slope};
}

template <class Device>
void register_sequence(torch::stable::detail::StableLibrary& m) {
  m.impl("token_logprob", TORCH_BOX(&token_logprob<Device>));
  m.impl("token_logprob_backward", TORCH_BOX(&token_logprob_backward<Device>));
  m.impl("sequence_ddo_loss", TORCH_BOX(&sequence_ddo_loss<Device>));
}

}  // namespace fastgen
