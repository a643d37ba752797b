// The generalized Jensen-Shannon divergence of rows of logits, of the family sequence, with a cross-entropy of labels.
#pragma once

#include <algorithm>
#include <limits>
#include <tuple>

#include "runtime/device.h"
#include "runtime/half.h"
#include "runtime/options.h"
#include "runtime/token_rows.h"
#include "skeleton/exp.h"

namespace fastgen {

template <class T>
FASTGEN_HD T value_at(const TokenStream& in, int64_t row, int64_t column) {
  const int64_t at = row / in.inner * in.outer_stride + row % in.inner * in.inner_stride + column;
  if (in.dtype == ScalarType::Double) return static_cast<T>(static_cast<const double*>(in.data)[at]);
  if (in.dtype == ScalarType::Float) return static_cast<T>(static_cast<const float*>(in.data)[at]);
  const uint16_t bits = static_cast<const uint16_t*>(in.data)[at];
  return static_cast<T>(in.dtype == ScalarType::BFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits));
}

// Between a teacher P and a student Q, M = beta P + (1 - beta) Q.
enum class Divergence {
  forward,  // KL(P‖Q)
  mixed,    // beta KL(P‖M) + (1 - beta) KL(Q‖M)
  reverse,  // KL(Q‖P)
};

template <class T>
struct JsdRow {
  T student_offset, teacher_offset;  // one of them is 0
  Origin<T> student, teacher;
  T shift;   // of log P - log Q: maxima without the offsets / temperature + the logarithms of the sums
  T student_share, teacher_share;  // what exponentials are times: of a row's sums and of its map, all at once
  T coefficient, center;  // of the gradient, with its share; center: to the base of d
  T hard;                 // with labels: times Q in the forward one's
};

// What each of two rows gives up before their logits are subtracted. A constant between the rows means nothing, and
// must round nothing.
//
// The row of larger magnitude gives up what it lies above the other, rounded to a multiple of the last place of all its
// logits that matter (those from 16 temperatures below the largest), which rounds none of them. Where that place is more
// than a temperature, what is left of the constant would round the other row: then each row gives up its largest logit.
// That is exact where a row is so large, and elsewhere rounds no more than a log-softmax does.
template <class T>
struct Offsets {
  T student, teacher;
};

template <class T>
FASTGEN_HD Offsets<T> offsets_of(T student, T teacher, T inverse_temperature) {
  constexpr T kEpsilon = std::numeric_limits<T>::epsilon();
  const bool teacher_moves = std::abs(teacher) > std::abs(student);
  const T reach = (teacher_moves ? std::abs(teacher) : std::abs(student)) + T(16) / inverse_temperature;
  const T grain = T(24) * (reach < T(1e29) ? reach : T(1e29));  // its last place is 16 to 32 of reach's
  if (grain * kEpsilon * inverse_temperature > T(1)) return {student, teacher};
  const T above = ((teacher - student) + grain) - grain;
  return {teacher_moves ? T(0) : -above, teacher_moves ? above : T(0)};
}

// What both the loss and its backward do with a pair of logits.
//
// Everything follows from Q, P and d = log P - log Q. Where |d| is small no digits cancel: d is formed of the logits
// themselves, for those of close models subtract exactly (after the rows' offsets), and what would cancel is a series in
// d. Elsewhere nothing overflows, for Q and P have exponentials of their own.
//
//             gradient / coefficient         loss
//   forward   Q - P                          Σ P d + (Q - P)
//   mixed     Q (a - Σ Q a), a = log Q/M     Σ beta P (d + a) + (1 - beta) Q a
//   reverse   Q (a - Σ Q a), a = -d          Σ Q a - (Q - P)
//
// kWithLabels: the forward one's gradient has a multiple of Q besides, of a cross-entropy (Labels).
//
// In the loss Q - P, which sums to 0, makes what belongs to an element non-negative and cancels what the rounding of the
// sums adds. The reverse one's a may be hundreds, and where 2^x is the hardware's Σ Q is 1 to 2^-22 only: its Σ Q a is
// divided by the sum of those very Q, or the center would be off from the a of those that have most probability.
// 0 log 0 = 0, where d may be NaN or infinite. Between the ends of beta all logarithms are to the device's
// base. There log M is taken over that of the two which weighs more, as d then is: log M over the other is a difference
// from d, of which a small weight leaves much.
template <class T, Divergence D, bool kWithLabels = false>
struct JsdElement {
  static constexpr int kParts = D == Divergence::forward ? 1 : 2;  // Q - P; or Q's exponential and a
  // The loss; Σ Q a, Σ Q - P and Σ Q; of exponentials, Σ P (d + a) and Σ Q a.
  static constexpr int kSums = D == Divergence::forward ? 1 : D == Divergence::reverse ? 3 : 2;
  static constexpr bool kMixed = D == Divergence::mixed;
  static constexpr double kLog = kMixed ? Base::kLog : 1;  // of what logarithms here are to
  T beta, rest, odds;  // (1 - beta) / beta, as the loss is summed over beta
  LogMixture<T> mixture;
  T sign, of_teacher, of_student;  // of d; whether log M is over P, as 0 and 1; whether over Q
  T inverse_temperature, scale, scale_of_d;  // 1 / temperature: natural, to the device's base, to that of d

  JsdElement(double beta, double temperature)
      : beta(static_cast<T>(beta)),
        rest(static_cast<T>(1 - beta)),
        odds(static_cast<T>((1 - beta) / beta)),
        mixture(beta > 0.5 ? 1 - beta : beta),
        sign(kMixed && beta > 0.5 ? T(-1) : T(1)),
        of_teacher(beta > 0.5),
        of_student(T(1) - of_teacher),
        inverse_temperature(static_cast<T>(1 / temperature)),
        scale(Base::scale(inverse_temperature)),
        scale_of_d(sign * (kMixed ? scale : inverse_temperature)) {}

  FASTGEN_HD JsdRow<T> row(const Softmax<T>& student, const Softmax<T>& teacher, T coefficient, T center) const {
    T s = base_of(student.max), t = base_of(teacher.max);
    const Origin<T> of_s(s, scale), of_t(t, scale);
    const T teacher_share = of_t.factor(t) / teacher.sum;
    const T student_share = of_s.factor(s) / student.sum + (teacher_share - teacher_share);  // NaN with the teacher's
    const Offsets<T> offsets = offsets_of(s, t, inverse_temperature);
    s -= offsets.student, t -= offsets.teacher;
    const T shift = (t - s) * scale_of_d + sign * std::log(teacher.sum / student.sum) * T(1 / kLog);
    const T of_map = D == Divergence::forward ? T(1) : student_share;
    return {offsets.student, offsets.teacher, of_s, of_t, shift, student_share, teacher_share,
            coefficient * T(kLog) * of_map, center * T(1 / kLog), T(0)};
  }

  FASTGEN_HD void element(const JsdRow<T>& row, const T* v, T* parts, T* sums) const {
    const T of_q = Base::power(row.student.from(v[0])), of_p = Base::power(row.teacher.from(v[1]));
    const T d = ((v[1] - row.teacher_offset) - (v[0] - row.student_offset)) * scale_of_d - row.shift;
    if constexpr (kMixed) {
      // NaN too, of two logits of -inf. What is beyond has as good as no probability in one of the two, and would round
      // the logarithm of the other's.
      const T bounded = at_most(at_least(d, -Base::kMost<T>), Base::kMost<T>);
      const T m = mixture.log(bounded), a = of_teacher * bounded - m;
      parts[0] = of_q, parts[1] = a;
      sums[0] += of_p * (of_student * bounded - m), sums[1] += of_q * a;
    } else {
      const T q = of_q * row.student_share, p = of_p * row.teacher_share;
      const T difference = std::abs(d) < T(kNear) ? -q * expm1_near(d) : q - p;  // Q - P
      if constexpr (D == Divergence::forward) {
        parts[0] = kWithLabels ? difference + row.hard * q : difference;
        sums[0] += p * (p == T(0) ? T(0) : d) + difference;
      } else {
        const T a = of_q == T(0) ? T(0) : -d;
        parts[0] = of_q, parts[1] = a;
        sums[0] += q * a, sums[1] += difference, sums[2] += q;
      }
    }
  }

  FASTGEN_HD T center(const JsdRow<T>& row, const T* sums) const {
    return kMixed ? row.student_share * sums[1] : D == Divergence::forward ? T(0) : sums[0] / sums[2];
  }
  FASTGEN_HD T loss(const JsdRow<T>& row, const T* sums) const {
    if constexpr (kMixed) return beta * T(kLog) * (row.teacher_share * sums[0] + odds * center(row, sums));
    else if constexpr (D == Divergence::forward) return sums[0];
    else return center(row, sums) - sums[1];
  }

  FASTGEN_HD T gradient(const JsdRow<T>& row, const T* parts) const {
    if constexpr (D == Divergence::forward) return row.coefficient * parts[0];
    else return row.coefficient * (parts[0] * (parts[1] - row.center));
  }

  FASTGEN_HD T gradient_scale() const { return (kMixed ? rest : T(1)) * inverse_temperature; }

  // Adds `hard` times Q, times what the loss is times, to the gradient of all elements, at temperature 1. Those that have
  // a center take it there: Q (a - center) + Q h = Q (a - (center - h)).
  FASTGEN_HD void add_labels(JsdRow<T>& row, T hard) const {
    if constexpr (D == Divergence::forward) row.hard = hard;
    else row.center -= hard / (gradient_scale() * T(kLog));
  }
};

// Where the row statistics of a divergence lie: five vectors.
template <class T>
struct JsdStats {
  Softmax<T*> student, teacher;
  T* center;

  FASTGEN_HD void store(int64_t row, const Softmax<T>& s, const Softmax<T>& t, T c) const {
    student.max[row] = s.max, student.sum[row] = s.sum;
    teacher.max[row] = t.max, teacher.sum[row] = t.sum;
    center[row] = c;
  }
  FASTGEN_HD Softmax<T> softmax(int64_t row, const Softmax<T*>& of) const { return {of.max[row], of.sum[row]}; }
};

template <class T>
struct JsdResults {
  T* loss;
  T* cross_entropy;
  JsdStats<T> stats;
};

template <class T>
FASTGEN_HD bool label_ignored(const int64_t* labels, int64_t ignore_index, int64_t row) {
  return labels != nullptr && labels[row] == ignore_index;
}

// Which rows count, and the cross-entropy of the labels that is added to a divergence at temperature 1, with the same
// softmax: `weight` times it. A label outside the vocabulary makes it NaN, and has no part in the gradient.
//
// Its gradient is Q, which the divergence's map adds, and -1 in the label's column, which a scatter writes after it.
template <class T>
struct Labels {
  const int64_t* of;  // may be null
  int64_t ignore_index, vocabulary;
  T weight;  // 0: none
  TokenStream student;

  FASTGEN_HD bool ignored(int64_t row) const { return of != nullptr && of[row] == ignore_index; }
  FASTGEN_HD bool inside(int64_t row) const { return weight != T(0) && of[row] >= 0 && of[row] < vocabulary; }
  FASTGEN_HD T weight_of(int64_t row) const { return inside(row) ? weight : T(0); }
  FASTGEN_HD T logit(int64_t row) const { return value_at<T>(student, row, of[row]); }
  FASTGEN_HD T cross_entropy(int64_t row, const Softmax<T>& softmax) const {
    if (weight == T(0)) return T(0);
    if (!inside(row)) return static_cast<T>(NAN);
    return std::log(softmax.sum) - (logit(row) - base_of(softmax.max));
  }
};

template <class T, Divergence D, bool kWithLabels>
struct GeneralizedJsd {
  static constexpr int kStreams = 2, kSums = JsdElement<T, D>::kSums, kParts = JsdElement<T, D>::kParts;
  static constexpr bool kNormalizes = true, kMapsAtOnce = D == Divergence::forward;
  struct Row {
    JsdRow<T> of;
    Softmax<T> student, teacher;
  };
  JsdElement<T, D, kWithLabels> of;
  T inverse_temperature;
  Labels<T> labels;
  const T* scale;  // one number; may be null: 1
  JsdResults<T> results;

  FASTGEN_HD bool ignored(int64_t row) const { return labels.ignored(row); }
  FASTGEN_HD void ignore(int64_t row) const {
    results.loss[row] = results.cross_entropy[row] = T(0);
    results.stats.store(row, {}, {}, T(0));
  }
  FASTGEN_HD Row row(int64_t row, const Softmax<T>* streams) const {
    const T coefficient = (scale ? *scale : T(1)) * of.gradient_scale();
    Row found{of.row(streams[0], streams[1], coefficient, T(0)), streams[0], streams[1]};
    if constexpr (D == Divergence::forward && kWithLabels) of.add_labels(found.of, labels.weight_of(row));
    return found;
  }
  FASTGEN_HD void element(const Row& row, const T* v, T* parts, T* sums) const { of.element(row.of, v, parts, sums); }
  FASTGEN_HD void epilogue(int64_t row, Row& constants, const T* sums) const {
    constants.of.center = of.center(constants.of, sums);
    const T hard = labels.cross_entropy(row, constants.student);
    results.loss[row] = (scale ? *scale : T(1)) * (of.loss(constants.of, sums) + labels.weight * hard);
    results.cross_entropy[row] = hard;
    results.stats.store(row, constants.student, constants.teacher, constants.of.center * T(of.kLog));
    if constexpr (D != Divergence::forward) of.add_labels(constants.of, labels.weight_of(row));
  }
  FASTGEN_HD T map(const Row& row, const T* parts) const { return of.gradient(row.of, parts); }
};

// The sums of a slice of the vocabulary, whose rows' normals are given. Slices' add up to a row's: no center is divided
// by Σ Q, which a slice does not know.
template <class T, Divergence D>
struct GeneralizedJsdSums : GeneralizedJsd<T, D, false> {
  using Whole = GeneralizedJsd<T, D, false>;
  static constexpr bool kNormalizes = false, kSumsOnly = true;
  static constexpr int kSums = std::min(Whole::kSums, 2);
  Softmax<const T*> student, teacher;

  FASTGEN_HD typename Whole::Row row(int64_t row, const Softmax<T>*) const {
    const Softmax<T> normals[] = {{student.max[row], student.sum[row]}, {teacher.max[row], teacher.sum[row]}};
    return Whole::row(row, normals);
  }
  FASTGEN_HD void epilogue(int64_t row, typename Whole::Row& constants, const T* sums) const {
    const T undivided[] = {sums[0], kSums > 1 ? sums[1] : T(0), T(1)};
    Whole::epilogue(row, constants, undivided);
  }
};

// Of [4, rows] normals.
template <class T, Divergence D>
GeneralizedJsdSums<T, D> slice_of(const GeneralizedJsd<T, D, false>& formula, const T* normals, int64_t rows) {
  return {formula, {normals, normals + rows}, {normals + 2 * rows, normals + 3 * rows}};
}

template <class T, Divergence D, bool kWithLabels>
struct GeneralizedJsdBackward {
  static constexpr int kStreams = 2, kSums = 0, kParts = JsdElement<T, D>::kParts;
  static constexpr bool kNormalizes = false;
  using Row = JsdRow<T>;
  JsdElement<T, D, kWithLabels> of;
  T inverse_temperature;
  Labels<T> labels;
  const T* grad;  // one number a row
  JsdStats<T> stats;

  FASTGEN_HD bool ignored(int64_t row) const { return labels.ignored(row); }
  FASTGEN_HD void ignore(int64_t) const {}
  FASTGEN_HD Row row(int64_t row, const Softmax<T>*) const {
    Row found = of.row(stats.softmax(row, stats.student), stats.softmax(row, stats.teacher), grad[row] * of.gradient_scale(), stats.center[row]);
    if constexpr (D != Divergence::forward || kWithLabels) of.add_labels(found, labels.weight_of(row));
    return found;
  }
  FASTGEN_HD void element(const Row& row, const T* v, T* parts, T*) const {
    T unused[3] = {};
    of.element(row, v, parts, unused);
  }
  FASTGEN_HD void epilogue(int64_t, Row&, const T*) const {}
  FASTGEN_HD T map(const Row& row, const T* parts) const { return of.gradient(row, parts); }
};

// The gradients of the labels' columns where they have a cross-entropy: a formula of the scatter (skeleton/scatter.h).
template <class T, Divergence D>
struct JsdLabels {
  struct Row {
    JsdRow<T> of;
    T base, log_sum, hard;
  };
  static constexpr int64_t entries = 1;
  JsdElement<T, D> of;
  Labels<T> labels;
  TokenStream teacher;
  int64_t columns;
  const T* scale;  // one number; may be null
  const T* grad;   // one a row; may be null
  JsdStats<T> stats;

  FASTGEN_HD bool ignored(int64_t row) const { return labels.ignored(row) || !labels.inside(row); }
  FASTGEN_HD Row row(int64_t row) const {
    const T factor = (scale ? *scale : T(1)) * (grad ? grad[row] : T(1));
    const Softmax<T> student = stats.softmax(row, stats.student);
    return {of.row(student, stats.softmax(row, stats.teacher), factor * of.gradient_scale(), stats.center[row]),
            base_of(student.max), std::log(student.sum), factor * labels.weight};
  }
  FASTGEN_HD int64_t column(int64_t row, int64_t) const { return labels.of[row]; }
  FASTGEN_HD T value(const Row& row, int64_t index, int64_t) const {
    const T v[2] = {labels.logit(index), value_at<T>(teacher, index, labels.of[index])};
    T parts[2] = {}, unused[3] = {};
    of.element(row.of, v, parts, unused);
    return of.gradient(row.of, parts) + row.hard * exponential(v[0] - row.base - row.log_sum).minus_one;
  }
  FASTGEN_HD T again(const Row&, int64_t, int64_t, T) const { return T(0); }
};

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

// Calls f with the divergence, and whether its elements have a share of a cross-entropy.
template <class F>
void with_labelled_divergence(double beta, bool labelled, const F& f) {
  with_divergence(beta, [&](auto divergence) {
    const auto labels = [&](auto with) { f(divergence, with); };
    if constexpr (decltype(divergence)::value == Divergence::forward) with_flag(labelled, labels);
    else labels(std::false_type{});
  });
}

// The tensors of the two operators, as kernels read them.
struct JsdInputs {
  TokenRows<2> rows;
  ScalarType dtype;
  std::optional<Tensor> labels;
  int64_t ignore_index;
  double hard_weight;

  JsdInputs(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& row_labels, int64_t ignored,
            double temperature, double cross_entropy_weight)
      : rows({student, teacher}),
        dtype(rows.arithmetic()),
        labels(row_labels),
        ignore_index(ignored),
        hard_weight(cross_entropy_weight) {
    if (labels) labels = made_contiguous(*labels);
    STD_TORCH_CHECK(hard_weight == 0 || (labels && temperature == 1 && rows.size == student.size(-1)),
                    "generalized_jsd: a cross-entropy wants labels, temperature 1 and a teacher of as many columns");
  }

  template <class T>
  Labels<T> rows_labels() const {
    return {labels_or_null(labels), ignore_index, rows.size, T(hard_weight), rows.stream[0]};
  }

  template <class T, Divergence D, bool kWithLabels>
  GeneralizedJsd<T, D, kWithLabels> formula(double beta, double temperature, const T* scale,
                                            const JsdResults<T>& results) const {
    return {JsdElement<T, D, kWithLabels>(beta, temperature), T(1 / temperature), rows_labels<T>(), scale, results};
  }

  // After the map, what it cannot know of the labels' columns.
  template <class Device, class T, Divergence D>
  void write_labels(double beta, const JsdStats<T>& stats, const T* scale, const T* grad, const Output& out) const {
    if (hard_weight == 0) return;
    Device::template scatter<T>(JsdLabels<T, D>{JsdElement<T, D>(beta, 1), rows_labels<T>(), rows.stream[1], rows.size,
                                                scale, grad, stats},
                                rows.tensors[0], rows.count, out);
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> generalized_jsd(
    const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& normals, const std::optional<Tensor>& scale, double beta, double temperature,
    int64_t ignore_index, double cross_entropy_weight, int64_t reduction, bool with_grad) {
  const JsdInputs inputs(student, teacher, labels, ignore_index, temperature, cross_entropy_weight);
  const TokenRows<2>& rows = inputs.rows;
  const auto factor = row_scalars(scale, inputs.dtype), given = row_scalars(normals, inputs.dtype);
  STD_TORCH_CHECK(!given || (!with_grad && cross_entropy_weight == 0),
                  "generalized_jsd: of a slice there are sums alone, which wait for those of all slices");
  const Tensor loss = new_per_row(student, inputs.dtype), hard = new_per_row(student, inputs.dtype);
  const Tensor stats = new_per_row(student, inputs.dtype, 5);
  const Tensor grad = with_grad ? Device::new_logits(student) : new_vector(student, 0, student.scalar_type());
  const Output out = output_of(grad, with_grad);
  return with_arithmetic(inputs.dtype, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const JsdResults<T> results{mutable_data<T>(loss), mutable_data<T>(hard), jsd_stats<T>(stats, rows.count)};
    const T* n = data_or_null<T>(given);
    if (n)
      with_divergence(beta, [&](auto divergence) {
        const auto formula = inputs.formula<T, decltype(divergence)::value, false>(beta, temperature, nullptr, results);
        Device::template sweep<T>(slice_of(formula, n, rows.count), rows, Output{}, 0);
      });
    else
      with_labelled_divergence(beta, cross_entropy_weight != 0, [&](auto divergence, auto labelled) {
        constexpr Divergence D = decltype(divergence)::value;
        const T* s = data_or_null<T>(factor);
        const auto formula = inputs.formula<T, D, decltype(labelled)::value>(beta, temperature, s, results);
        Device::template sweep<T>(formula, rows, out, student.size(-1));
        if (with_grad) inputs.write_labels<Device, T, D>(beta, results.stats, s, nullptr, out);
      });
    return {option<Reduction>(reduction) == Reduction::none ? loss : Device::template sum<T>(loss), hard, stats, grad};
  });
}

template <class Device>
Tensor generalized_jsd_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                const std::optional<Tensor>& labels, const Tensor& stats, double beta,
                                double temperature, int64_t ignore_index, double cross_entropy_weight) {
  const JsdInputs inputs(student, teacher, labels, ignore_index, temperature, cross_entropy_weight);
  const auto row_grad = row_scalars(grad, inputs.dtype);
  const Tensor saved = made_contiguous(stats), grad_student = Device::new_logits(student);
  const Output out{grad_student.mutable_data_ptr(), student.scalar_type()};
  with_arithmetic(inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_labelled_divergence(beta, cross_entropy_weight != 0, [&](auto divergence, auto labelled) {
      constexpr Divergence D = decltype(divergence)::value;
      constexpr bool kWithLabels = decltype(labelled)::value;
      const GeneralizedJsdBackward<T, D, kWithLabels> formula{
          JsdElement<T, D, kWithLabels>(beta, temperature), T(1 / temperature), inputs.rows_labels<T>(),
          data_or_null<T>(row_grad), jsd_stats<T>(saved, inputs.rows.count)};
      Device::template sweep<T>(formula, inputs.rows, out, student.size(-1));
      inputs.write_labels<Device, T, D>(beta, formula.stats, nullptr, formula.grad, out);
    });
  });
  return grad_student;
}

template <class Device>
void register_generalized_jsd(torch::stable::detail::StableLibrary& m) {
  m.impl("generalized_jsd", TORCH_BOX(&generalized_jsd<Device>));
  m.impl("generalized_jsd_backward", TORCH_BOX(&generalized_jsd_backward<Device>));
}

}  // namespace fastgen
