// Losses over rows of logits. A *sweep* (csrc/cpu/sweep.h) normalises the rows of one or two streams, hands every
// element to a formula, and writes a gradient:
//
//   template <class T> struct Formula {
//     static constexpr int kStreams;        // 1 or 2
//     static constexpr bool kNormalizes;    // the sweep finds the rows' Softmax; else row() has them from elsewhere
//     static constexpr int kSums;           // that the elements of a row add up to
//     static constexpr int kParts;          // that map() wants of an element; 0: nothing is written
//     struct Row { ... };                   // constants of a row
//     T inverse_temperature;
//     bool ignored(int64_t row) const;      // the row is not read; its output is 0
//     void ignore(int64_t row) const;       // stores the results of such a row
//     Row row(int64_t row, const Softmax<T>* streams) const;
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

// What a softmax divides by: the maximum of a row and Σ exp((v - max) / temperature). Apart, and the sum itself rather
// than its logarithm: a log-sum of 10 in float would put an error of 5e-7 on all probabilities of the row at once.
template <class T>
struct Softmax {
  T max, sum;
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

// logprob[row] = (v_token - max) / temperature - log sum
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
    logprob[row] = (v - base_of(constants.max)) * inverse_temperature - std::log(constants.sum);
  }
};

// grad[row] * (onehot - softmax) / temperature
template <class T>
struct TokenLogprobBackward {
  static constexpr int kStreams = 1, kSums = 0, kParts = 1;
  static constexpr bool kNormalizes = false;
  struct Row {
    T max, coefficient, share, log_sum;
  };
  Tokens<T> tokens;
  T inverse_temperature;
  const T* grad;
  Softmax<const T*> saved;

  FASTGEN_HD bool ignored(int64_t row) const { return tokens.ignored(row) || !tokens.inside(row); }
  FASTGEN_HD void ignore(int64_t) const {}
  FASTGEN_HD Row row(int64_t row, const Softmax<T>*) const {
    const T coefficient = grad[row] * inverse_temperature, sum = saved.sum[row];
    return {base_of(saved.max[row]), coefficient, -coefficient / sum, std::log(sum)};
  }
  FASTGEN_HD T scaled(const Row& row, T v) const { return (v - row.max) * inverse_temperature; }
  FASTGEN_HD void element(const Row& row, const T* v, T* parts, T*) const { parts[0] = exp_of(scaled(row, v[0])); }
  FASTGEN_HD void epilogue(int64_t, Row&, const T*) const {}
  FASTGEN_HD T map(const Row& row, const T* parts) const { return row.share * parts[0]; }
  FASTGEN_HD int64_t picked(int64_t row) const { return tokens.token[row]; }
  FASTGEN_HD T map_picked(const Row& row, T v) const {
    return -row.coefficient * exponential(scaled(row, v) - row.log_sum).minus_one;
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
  T student_offset, teacher_offset;                          // one of them is 0
  T student_max, student_share, teacher_max, teacher_share;  // without the offsets; share: 1 / sum
  T shift;  // teacher - student: of the maxima without the offsets / temperature + the logarithms of the sums
  T coefficient, center;
};

// What `high` lies above `low`, rounded to a multiple of the last place of all logits of these maxima that matter (from
// 16 temperatures below): it can be subtracted from the logits of larger magnitude without rounding them.
template <class T>
FASTGEN_HD T exact_offset(T high, T low, T inverse_temperature) {
  const T largest = std::abs(high) > std::abs(low) ? std::abs(high) : std::abs(low);
  const T reach = largest + T(16) / inverse_temperature;
  const T grain = T(24) * (reach < T(1e29) ? reach : T(1e29));  // adding it rounds to its last place, 16 to 32 of reach's
  return ((high - low) + grain) - grain;
}

// What both the loss and its backward do with a pair of logits.
//
// With x = log Q, y = log P everything follows from d = y - x, the larger of the two probabilities and the ratio
// e^-|d| of the smaller to it: nothing overflows, log(M / larger) is a log1p, and where the student is close to the
// teacher no digits cancel. (Logits of close models subtract exactly, so d is formed of the logits themselves. What the
// one row lies above the other, which means nothing, is first taken from the row of the larger logits, exactly too.)
//
//             gradient / coefficient       loss
//   forward   Q - P                        Σ P d + (Q - P)
//   mixed     Q (a - Σ Q a), a = x - log M   Σ beta P (y - log M) + (1 - beta) Q a
//   reverse   Q (a - Σ Q a), a = x - y       Σ Q a - (Q - P)
//
// In the loss Q - P, which sums to 0, makes every summand non-negative and cancels what the rounding of the sums adds.
// 0 log 0 = 0.
template <class T, Divergence D>
struct JsdElement {
  static constexpr int kParts = D == Divergence::forward ? 1 : 2;  // Q - P; or Q and a
  T beta, rest;  // rest: 1 - beta, which float would round
  T inverse_temperature;

  FASTGEN_HD JsdRow<T> row(const Softmax<T>& student, const Softmax<T>& teacher, T coefficient, T center) const {
    T s = base_of(student.max), t = base_of(teacher.max);
    const T above = exact_offset(t, s, inverse_temperature);
    const bool of_teacher = std::abs(t) > std::abs(s);
    const T student_offset = of_teacher ? T(0) : -above, teacher_offset = of_teacher ? above : T(0);
    s -= student_offset, t -= teacher_offset;
    const T shift = (t - s) * inverse_temperature + std::log(teacher.sum / student.sum);
    return {student_offset, teacher_offset, s, T(1) / student.sum, t, T(1) / teacher.sum, shift, coefficient, center};
  }

  FASTGEN_HD void element(const JsdRow<T>& row, const T* v, T* parts, T* sums) const {
    const T s = v[0] - row.student_offset, t = v[1] - row.teacher_offset;
    // Equal logits may both be -inf.
    const T d = (s == t ? T(0) : t - s) * inverse_temperature - row.shift;
    const bool teacher_larger = d > T(0);
    // Finite, so that what has probability 0 adds 0 without a mask; the ends of beta can be infinite and need d itself.
    const T gap = -std::abs(d) < T(-1e30) ? T(-1e30) : -std::abs(d);
    const T above = teacher_larger ? t - row.teacher_max : s - row.student_max;
    const T larger = exp_of(above * inverse_temperature) * (teacher_larger ? row.teacher_share : row.student_share);
    const Exponential<T> ratio = exponential(gap);
    const T smaller = larger * ratio.value;
    if constexpr (D == Divergence::mixed) {
      const T of_larger = teacher_larger ? beta : rest, of_smaller = teacher_larger ? rest : beta;
      const T log_m = log_of(of_larger + of_smaller * ratio.value, of_smaller * ratio.minus_one);  // log(M / larger)
      const T log_smaller = gap - log_m;  // log(smaller / M)
      const T a = larger * -log_m, b = smaller * log_smaller;
      parts[0] = teacher_larger ? smaller : larger, parts[1] = teacher_larger ? log_smaller : -log_m;
      sums[0] += of_larger * a + of_smaller * b, sums[1] += teacher_larger ? b : a;
    } else {
      const T difference = larger * (teacher_larger ? ratio.minus_one : -ratio.minus_one);  // Q - P
      if constexpr (D == Divergence::forward) {
        const T p = teacher_larger ? larger : smaller;
        parts[0] = difference;
        sums[0] += (p == T(0) ? T(0) : p * d) + difference;
      } else {
        const T q = teacher_larger ? smaller : larger, a = q == T(0) ? T(0) : -d;
        parts[0] = q, parts[1] = a;
        sums[0] += q * a - difference, sums[1] += q * a;
      }
    }
  }

  FASTGEN_HD T gradient(const JsdRow<T>& row, const T* parts) const {
    if constexpr (D == Divergence::forward) return row.coefficient * parts[0];
    else return row.coefficient * (parts[0] * (parts[1] - row.center));
  }

  FASTGEN_HD T gradient_scale() const {
    return (D == Divergence::mixed ? rest : T(1)) * inverse_temperature;
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
};

template <class T>
FASTGEN_HD bool label_ignored(const int64_t* labels, int64_t ignore_index, int64_t row) {
  return labels != nullptr && labels[row] == ignore_index;
}

template <class T, Divergence D>
struct GeneralizedJsd {
  static constexpr int kStreams = 2, kSums = 2, kParts = JsdElement<T, D>::kParts;
  static constexpr bool kNormalizes = true;
  struct Row {
    JsdRow<T> of;
    Softmax<T> student, teacher;
  };
  JsdElement<T, D> of;
  T inverse_temperature;
  const int64_t* labels;  // may be null
  int64_t ignore_index;
  const T* scale;  // one number; may be null: 1
  T* loss;
  JsdStats<T> stats;

  FASTGEN_HD bool ignored(int64_t row) const { return label_ignored<T>(labels, ignore_index, row); }
  FASTGEN_HD void ignore(int64_t row) const {
    loss[row] = T(0);
    stats.store(row, {}, {}, T(0));
  }
  FASTGEN_HD Row row(int64_t, const Softmax<T>* streams) const {
    const T coefficient = (scale ? *scale : T(1)) * of.gradient_scale();
    return {of.row(streams[0], streams[1], coefficient, T(0)), streams[0], streams[1]};
  }
  FASTGEN_HD void element(const Row& row, const T* v, T* parts, T* sums) const { of.element(row.of, v, parts, sums); }
  FASTGEN_HD void epilogue(int64_t row, Row& constants, const T* sums) const {
    constants.of.center = D == Divergence::forward ? T(0) : sums[1];
    loss[row] = (scale ? *scale : T(1)) * sums[0];
    stats.store(row, constants.student, constants.teacher, constants.of.center);
  }
  FASTGEN_HD T map(const Row& row, const T* parts) const { return of.gradient(row.of, parts); }
};

template <class T, Divergence D>
struct GeneralizedJsdBackward {
  static constexpr int kStreams = 2, kSums = 0, kParts = JsdElement<T, D>::kParts;
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
  FASTGEN_HD Row row(int64_t row, const Softmax<T>*) const {
    return of.row({stats.student.max[row], stats.student.sum[row]}, {stats.teacher.max[row], stats.teacher.sum[row]},
                  grad[row] * of.gradient_scale(), stats.center[row]);
  }
  FASTGEN_HD void element(const Row& row, const T* v, T* parts, T*) const {
    T unused[2] = {};
    of.element(row, v, parts, unused);
  }
  FASTGEN_HD void epilogue(int64_t, Row&, const T*) const {}
  FASTGEN_HD T map(const Row& row, const T* parts) const { return of.gradient(row, parts); }
};

}  // namespace fastgen
