// Losses over rows of logits. A *sweep* (csrc/cpu/sweep.h) normalises the rows of one or two streams, hands every
// element to a formula, and writes a gradient:
//
//   template <class T> struct Formula {
//     static constexpr int kStreams;        // 1 or 2
//     static constexpr bool kNormalizes;    // the sweep finds the rows' LogSum; else row() has them from elsewhere
//     static constexpr int kSums;           // that the elements of a row add up to
//     static constexpr int kParts;          // that map() wants of an element; 0: nothing is written
//     struct Row { ... };                   // constants of a row
//     T inverse_temperature;
//     bool ignored(int64_t row) const;      // the row is not read; its output is 0
//     void ignore(int64_t row) const;       // stores the results of such a row
//     Row row(int64_t row, const LogSum<T>* streams) const;
//     void element(const Row&, const T* v, T* parts, T* sums) const;  // sets parts, adds to sums
//     void epilogue(int64_t row, Row&, const T* sums) const;          // stores results; completes the row for map()
//     T map(const Row&, const T* parts) const;                        // one output element
//     int64_t picked(int64_t row) const;    // optional: the one column, if in range, of which these two want to know:
//     void pick(int64_t row, const Row&, T v) const;   // without parts
//     T map_picked(const Row&, T v) const;             // with parts: its output, instead of map()
//   };
//
// Logits beyond the narrower stream take no part: their output is 0.
#pragma once

#include "elbo.h"
#include "exp.h"

namespace fastgen {

// Of a row: its maximum, and log Σ exp((v - max) / temperature). Apart, for their sum would round it.
template <class T>
struct LogSum {
  T max, log_sum;
};

// The maximum of a row, as something to subtract: a row of -inf must sum to 0, not to NaN.
template <class T>
FASTGEN_HD T base_of(T max) {
  return max == -static_cast<T>(INFINITY) ? T(0) : max;
}

template <class T>
struct Tokens {
  const int64_t* token;
  int64_t ignore_index, vocabulary;

  FASTGEN_HD bool ignored(int64_t row) const { return token[row] == ignore_index; }
  FASTGEN_HD bool inside(int64_t row) const { return token[row] >= 0 && token[row] < vocabulary; }
};

// logprob[row] = (v_token - max) / temperature - log_sum
template <class T>
struct TokenLogprob {
  static constexpr int kStreams = 1, kSums = 0, kParts = 0;
  static constexpr bool kNormalizes = true;
  using Row = LogSum<T>;
  Tokens<T> tokens;
  T inverse_temperature;
  T* logprob;
  T* max;
  T* log_sum;

  FASTGEN_HD bool ignored(int64_t row) const { return tokens.ignored(row); }
  FASTGEN_HD void ignore(int64_t row) const { logprob[row] = max[row] = log_sum[row] = T(0); }
  FASTGEN_HD Row row(int64_t, const LogSum<T>* streams) const { return streams[0]; }
  FASTGEN_HD void epilogue(int64_t row, Row& constants, const T*) const {
    max[row] = constants.max, log_sum[row] = constants.log_sum;
    if (!tokens.inside(row)) logprob[row] = static_cast<T>(NAN);
  }
  FASTGEN_HD int64_t picked(int64_t row) const { return tokens.token[row]; }
  FASTGEN_HD void pick(int64_t row, const Row& constants, T v) const {
    logprob[row] = (v - base_of(constants.max)) * inverse_temperature - constants.log_sum;
  }
};

// grad[row] * (onehot - softmax) / temperature
template <class T>
struct TokenLogprobBackward {
  static constexpr int kStreams = 1, kSums = 0, kParts = 1;
  static constexpr bool kNormalizes = false;
  struct Row {
    LogSum<T> of;
    T coefficient;
  };
  Tokens<T> tokens;
  T inverse_temperature;
  const T* grad;
  const T* max;
  const T* log_sum;

  FASTGEN_HD bool ignored(int64_t row) const { return tokens.ignored(row) || !tokens.inside(row); }
  FASTGEN_HD void ignore(int64_t) const {}
  FASTGEN_HD Row row(int64_t row, const LogSum<T>*) const {
    return {{base_of(max[row]), log_sum[row]}, grad[row] * inverse_temperature};
  }
  FASTGEN_HD T log_of_softmax(const Row& row, T v) const { return (v - row.of.max) * inverse_temperature - row.of.log_sum; }
  FASTGEN_HD void element(const Row& row, const T* v, T* parts, T*) const { parts[0] = exp_of(log_of_softmax(row, v[0])); }
  FASTGEN_HD void epilogue(int64_t, Row&, const T*) const {}
  FASTGEN_HD T map(const Row& row, const T* parts) const { return -row.coefficient * parts[0]; }
  FASTGEN_HD int64_t picked(int64_t row) const { return tokens.token[row]; }
  FASTGEN_HD T map_picked(const Row& row, T v) const {
    return -row.coefficient * exponential(log_of_softmax(row, v)).minus_one;
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
};

// Between a teacher P and a student Q, M = beta P + (1 - beta) Q.
enum class Divergence {
  forward,  // KL(P‖Q)
  mixed,    // beta KL(P‖M) + (1 - beta) KL(Q‖M)
  reverse,  // KL(Q‖P)
};

template <class T>
struct JsdRow {
  LogSum<T> student, teacher;
  T shift;      // of the maxima: teacher - student
  T log_shift;  // of the log sums
  T coefficient, center;
};

// What both the loss and its backward do with a pair of logits.
//
// With x = log Q, y = log P everything follows from d = y - x, the larger of the two probabilities and the ratio
// e^-|d| of the smaller to it: nothing overflows, log(M / larger) is a log1p, and where the student is close to the
// teacher no digits cancel. The gradient of a row is coefficient * (w - center * q) with
//
//   forward  w = Q - P                  center 0         loss Σ P d + (Q - P)
//   mixed    w = Q (x - log M)          center Σ w       loss Σ beta P (y - log M) + (1 - beta) w
//   reverse  w = Q (x - y)              center Σ w       loss Σ w - (Q - P)
//
// In the loss Q - P, which sums to 0, makes every summand non-negative and cancels what the rounding of the log sums
// adds. 0 log 0 = 0.
template <class T, Divergence D>
struct JsdElement {
  T beta, rest;  // rest: 1 - beta, which float would round
  T inverse_temperature;

  FASTGEN_HD JsdRow<T> row(const LogSum<T>& student, const LogSum<T>& teacher, T coefficient, T center) const {
    const T s = base_of(student.max), t = base_of(teacher.max);
    return {{s, student.log_sum}, {t, teacher.log_sum}, t - s, teacher.log_sum - student.log_sum, coefficient, center};
  }

  FASTGEN_HD void element(const JsdRow<T>& row, const T* v, T* parts, T* sums) const {
    const T s = v[0], t = v[1];
    const T x = (s - row.student.max) * inverse_temperature - row.student.log_sum;
    const T y = (t - row.teacher.max) * inverse_temperature - row.teacher.log_sum;
    // Equal logits may both be -inf.
    const T d = ((s == t ? T(0) : t - s) - row.shift) * inverse_temperature - row.log_shift;
    const bool teacher_larger = d > T(0);
    const T gap = teacher_larger ? -d : d;
    const T larger = exp_of(teacher_larger ? y : x);
    const Exponential<T> ratio = exponential(gap);
    const T smaller = larger * ratio.value;
    const T q = teacher_larger ? smaller : larger, p = teacher_larger ? larger : smaller;
    const T difference = larger * (teacher_larger ? ratio.minus_one : -ratio.minus_one);  // Q - P
    parts[0] = q;
    if constexpr (D == Divergence::forward) {
      parts[1] = difference;
      sums[0] += (p == T(0) ? T(0) : p * d) + difference;
    } else if constexpr (D == Divergence::reverse) {
      parts[1] = q == T(0) ? T(0) : -q * d;
      sums[0] += parts[1] - difference, sums[1] += parts[1];
    } else {
      const T weight = teacher_larger ? beta : rest, other = teacher_larger ? rest : beta;
      const T log_m = log_of(weight + other * ratio.value, other * ratio.minus_one);  // log(M / larger)
      const T of_smaller = gap - log_m;
      const T a = teacher_larger ? of_smaller : -log_m, b = teacher_larger ? -log_m : of_smaller;
      parts[1] = q == T(0) ? T(0) : q * a;
      sums[0] += beta * (p == T(0) ? T(0) : p * b) + rest * parts[1], sums[1] += parts[1];
    }
  }

  FASTGEN_HD T gradient_scale() const {
    return (D == Divergence::mixed ? rest : T(1)) * inverse_temperature;
  }
};

// Where the row statistics of a divergence lie: five vectors.
template <class T>
struct JsdStats {
  T *student_max, *student_log_sum, *teacher_max, *teacher_log_sum, *center;
};

template <class T>
FASTGEN_HD bool label_ignored(const int64_t* labels, int64_t ignore_index, int64_t row) {
  return labels != nullptr && labels[row] == ignore_index;
}

template <class T, Divergence D>
struct GeneralizedJsd {
  static constexpr int kStreams = 2, kSums = 2, kParts = 2;
  static constexpr bool kNormalizes = true;
  using Row = JsdRow<T>;
  JsdElement<T, D> of;
  T inverse_temperature;
  const int64_t* labels;  // may be null
  int64_t ignore_index;
  const T* scale;  // one number; may be null: 1
  T* loss;
  JsdStats<T> stats;

  FASTGEN_HD bool ignored(int64_t row) const { return label_ignored<T>(labels, ignore_index, row); }
  FASTGEN_HD void ignore(int64_t row) const {
    loss[row] = stats.student_max[row] = stats.student_log_sum[row] = T(0);
    stats.teacher_max[row] = stats.teacher_log_sum[row] = stats.center[row] = T(0);
  }
  FASTGEN_HD Row row(int64_t, const LogSum<T>* streams) const {
    return of.row(streams[0], streams[1], (scale ? *scale : T(1)) * of.gradient_scale(), T(0));
  }
  FASTGEN_HD void element(const Row& row, const T* v, T* parts, T* sums) const { of.element(row, v, parts, sums); }
  FASTGEN_HD void epilogue(int64_t row, Row& constants, const T* sums) const {
    constants.center = D == Divergence::forward ? T(0) : sums[1];
    loss[row] = (scale ? *scale : T(1)) * sums[0];
    stats.student_max[row] = constants.student.max, stats.student_log_sum[row] = constants.student.log_sum;
    stats.teacher_max[row] = constants.teacher.max, stats.teacher_log_sum[row] = constants.teacher.log_sum;
    stats.center[row] = constants.center;
  }
  FASTGEN_HD T map(const Row& row, const T* parts) const { return row.coefficient * (parts[1] - row.center * parts[0]); }
};

template <class T, Divergence D>
struct GeneralizedJsdBackward {
  static constexpr int kStreams = 2, kSums = 0, kParts = 2;
  static constexpr bool kNormalizes = false;
  using Row = JsdRow<T>;
  JsdElement<T, D> of;
  T inverse_temperature;
  const int64_t* labels;
  int64_t ignore_index;
  const T* grad;  // one number a row
  JsdStats<T> stats;

  FASTGEN_HD bool ignored(int64_t row) const { return label_ignored<T>(labels, ignore_index, row); }
  FASTGEN_HD void ignore(int64_t) const {}
  FASTGEN_HD Row row(int64_t row, const LogSum<T>*) const {
    return of.row({stats.student_max[row], stats.student_log_sum[row]},
                  {stats.teacher_max[row], stats.teacher_log_sum[row]}, grad[row] * of.gradient_scale(),
                  stats.center[row]);
  }
  FASTGEN_HD void element(const Row& row, const T* v, T* parts, T*) const {
    T unused[2] = {};
    of.element(row, v, parts, unused);
  }
  FASTGEN_HD void epilogue(int64_t, Row&, const T*) const {}
  FASTGEN_HD T map(const Row& row, const T* parts) const { return row.coefficient * (parts[1] - row.center * parts[0]); }
};

}  // namespace fastgen
