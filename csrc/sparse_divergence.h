// Divergences from a teacher that is known on a few ids of the vocabulary, of the family sequence.
//
// A row's student is a softmax over the whole vocabulary. A sweep finds it; the formula's row() then takes the
// teacher's entries, with their gathered logits, to the row's loss and to two numbers of its gradient: every element's
// is `outside` times its probability, but for the entries' own columns, which a scatter writes after the map.
#pragma once

#include "generalized_jsd.h"

namespace fastgen {

// What becomes of the probabilities outside the teacher's entries. The order is the declaration's.
enum class Tail : int64_t { bucket, renormalize, none };

// How far above 0 and 1 the logarithm of a probability and a mass are what rounding to 16 bits makes of them.
constexpr double kRoundedMass = 1.0 / 32;

// One category of two distributions: Q - P, Q, the slope h (of log Q in the sum that the divergence is, up to what
// cancels) and the loss, as JsdElement of generalized_jsd.h has them.
template <class T>
struct Category {
  T difference, q, slope, loss;
};

// Of the larger of P and Q, the smaller's ratio to it and d = log P - log Q. `balanced`: both distributions sum to 1.
template <class T, Divergence D>
FASTGEN_HD Category<T> category_of(T larger, const Exponential<T>& ratio, T d, T beta, T rest, bool balanced) {
  const bool teacher_larger = d > T(0);
  const T smaller = larger * ratio.value;
  const T q = teacher_larger ? smaller : larger, p = teacher_larger ? larger : smaller;
  const T difference = larger * (teacher_larger ? ratio.minus_one : -ratio.minus_one), balance = balanced ? difference : T(0);
  if constexpr (D == Divergence::forward) {
    return {difference, q, T(0), (p == T(0) ? T(0) : p * d) + balance};
  } else if constexpr (D == Divergence::reverse) {
    const T slope = q == T(0) ? T(0) : -d;
    return {difference, q, slope, q * slope - balance};
  } else {
    const T gap = -std::abs(d) < T(-1e30) ? T(-1e30) : -std::abs(d);
    const T of_larger = teacher_larger ? beta : rest, of_smaller = teacher_larger ? rest : beta;
    const T log_m = log_of(of_larger + of_smaller * ratio.value, of_smaller * ratio.minus_one);  // log(M / larger)
    const T log_smaller = gap - log_m;
    return {difference, q, teacher_larger ? log_smaller : -log_m,
            of_larger * (larger * -log_m) + of_smaller * (smaller * log_smaller)};
  }
}

// Of log Q and log P.
template <class T, Divergence D>
FASTGEN_HD Category<T> category(T log_q, T log_p, T beta, T rest, bool balanced) {
  const T d = log_q == log_p ? T(0) : log_p - log_q;  // both may be -inf
  const T gap = -std::abs(d) < T(-1e30) ? T(-1e30) : -std::abs(d);
  return category_of<T, D>(exp_of(d > T(0) ? log_p : log_q), exponential(gap), d, beta, rest, balanced);
}

// Numbers of a row: what is taken from log Q and log P, where they are renormalised; and its gradient's.
template <class T>
struct SparseRow {
  T shift_q, shift_p, center, outside;
};

// Where they are kept between the passes, with the student's maximum and sum: six vectors.
template <class T>
struct SparseStats {
  Softmax<T*> student;
  SparseRow<T*> of;

  FASTGEN_HD void store(int64_t row, const Softmax<T>& s, const SparseRow<T>& r) const {
    student.max[row] = s.max, student.sum[row] = s.sum;
    of.shift_q[row] = r.shift_q, of.shift_p[row] = r.shift_p, of.center[row] = r.center, of.outside[row] = r.outside;
  }
  FASTGEN_HD SparseRow<T> load(int64_t row) const {
    return {of.shift_q[row], of.shift_p[row], of.center[row], of.outside[row]};
  }
};

// The entries of all rows, and what is done with them.
template <class T, Divergence D>
struct Sparse {
  TokenStream student;
  const T* logprobs;  // [rows, entries]
  const int64_t* ids;
  int64_t entries, columns;
  const int64_t* labels;  // may be null
  int64_t ignore_index;
  const T* weight;  // a number a row; may be null: 1
  T beta, rest, inverse_temperature;
  Tail tail;

  FASTGEN_HD bool ignored(int64_t row) const { return label_ignored<T>(labels, ignore_index, row); }
  FASTGEN_HD T weight_of(int64_t row) const { return weight ? weight[row] : T(1); }
  FASTGEN_HD int64_t column(int64_t row, int64_t k) const { return ids[row * entries + k]; }

  // log Q and log P of an entry; NaN of an id beyond the vocabulary.
  FASTGEN_HD Softmax<T> logs(int64_t row, int64_t k, T base, T log_sum) const {
    const int64_t id = column(row, k);
    T y = logprobs[row * entries + k];
    y = y > T(kRoundedMass) || id >= columns ? static_cast<T>(NAN) : y > T(0) ? T(0) : y;
    const T v = id >= columns ? static_cast<T>(NAN) : value_at<T>(student, row, id);
    return {(v - base) * inverse_temperature - log_sum, y};
  }

  FASTGEN_HD T gradient_scale() const { return (D == Divergence::mixed ? rest : T(1)) * inverse_temperature; }

  // d loss / d (log Q of the entry), as part of the gradient that its column gets.
  FASTGEN_HD T gradient(const SparseRow<T>& of, const Category<T>& c) const {
    if constexpr (D == Divergence::forward) return c.difference - of.center * c.q;
    else return c.q * (c.slope - of.center);
  }

  // The entries of a row, by all threads of a team; every one has the results: `loss` and the `masses` of Q and P.
  template <class Team>
  FASTGEN_HD SparseRow<T> entries_of(int64_t row, const Softmax<T>& softmax, T* loss, T* masses) const {
    const T base = base_of(softmax.max), log_sum = std::log(softmax.sum);
    // Where they are renormalised, their largest is taken off: probabilities of entries that all underflow have ratios.
    T most_q = T(0), most_p = T(0);
    if (tail == Tail::renormalize) {
      most_q = most_p = -static_cast<T>(INFINITY);
      for (int64_t k = Team::first(); k < entries; k += Team::step()) {
        if (column(row, k) < 0) continue;
        const Softmax<T> log = logs(row, k, base, log_sum);
        most_q = log.max > most_q ? log.max : most_q, most_p = log.sum > most_p ? log.sum : most_p;
      }
      most_q = base_of(static_cast<T>(Team::max(most_q))), most_p = base_of(static_cast<T>(Team::max(most_p)));
    }
    double q = 0, p = 0, count = 0;
    for (int64_t k = Team::first(); k < entries; k += Team::step()) {
      if (column(row, k) < 0) continue;
      const Softmax<T> log = logs(row, k, base, log_sum);
      q += static_cast<double>(exp_of(log.max - most_q));
      p += static_cast<double>(exp_of(log.sum - most_p));
      count += 1;
    }
    q = Team::sum(q), p = Team::sum(p), count = Team::sum(count);
    SparseRow<T> of{T(0), T(0), T(0), T(0)};
    if (tail == Tail::renormalize) {
      of.shift_q = most_q + static_cast<T>(std::log(q)), of.shift_p = most_p + static_cast<T>(std::log(p));
      q *= static_cast<double>(exp_of(most_q)), p *= static_cast<double>(exp_of(most_p));
    }
    if (p > 1 + kRoundedMass) p = NAN;
    masses[0] = static_cast<T>(q > 1 ? 1 : q), masses[1] = static_cast<T>(p > 1 ? 1 : p);
    *loss = T(0);
    if (count == 0) return {T(0), T(0), T(0), T(0)};
    double total = 0, difference = 0, slope = 0;
    for (int64_t k = Team::first(); k < entries; k += Team::step()) {
      if (column(row, k) < 0) continue;
      const Softmax<T> log = logs(row, k, base, log_sum);
      const Category<T> c = category<T, D>(log.max - of.shift_q, log.sum - of.shift_p, beta, rest, tail != Tail::none);
      total += static_cast<double>(c.loss), difference += static_cast<double>(c.difference);
      slope += static_cast<double>(c.q * c.slope);
    }
    total = Team::sum(total), difference = Team::sum(difference), slope = Team::sum(slope);
    Category<T> others{};
    if (tail == Tail::bucket) {
      others = bucket(q, p, difference), total += static_cast<double>(others.loss);
      // Of ids that occur twice Q can be more than 1 in all. Then Q - P, which KL divergences have, does not sum to 0.
      if (q > 1) total += D == Divergence::forward ? 1 - q : D == Divergence::reverse ? q - 1 : 0.0;
    }
    *loss = static_cast<T>(total + 0 * p);  // NaN of a teacher that is none
    const bool moves = tail == Tail::bucket && !(1 - q < least());  // a bucket that is as good as empty has no gradient
    const bool whole = moves || tail == Tail::renormalize;          // what has gradients sums to 1
    if constexpr (D == Divergence::forward) {
      of.center = whole ? T(0) : static_cast<T>(1 - p);
      of.outside = moves ? others.difference / others.q : whole ? T(0) : static_cast<T>(p);
    } else {
      // The bucket's slope less the center, by the entries alone: a bucket that holds nearly all would cancel.
      const double of_bucket = static_cast<double>(others.slope);
      of.outside = static_cast<T>(moves                        ? q * of_bucket - slope
                                  : whole                      ? 0.0
                                  : D == Divergence::reverse   ? -(slope + q)
                                                               : -slope);
      if (moves) slope += static_cast<double>(others.q) * of_bucket;
      of.center = static_cast<T>(D == Divergence::reverse && !whole ? slope + q - 1 : slope);
    }
    of.center += static_cast<T>(0 * p), of.outside += static_cast<T>(0 * p);
    return of;
  }

  // The probability that an empty bucket counts as having.
  FASTGEN_HD static constexpr double least() { return sizeof(T) == 4 ? 0x1p-24 : 0x1p-53; }

  // All ids besides the entries' as one category, where Q - P over the entries is `difference`: summed of differences,
  // it has the digits that 1 - Q and 1 - P have lost when the two are close.
  FASTGEN_HD Category<T> bucket(double q, double p, double difference) const {
    const bool clamped = 1 - q < least() || 1 - p < least();
    const T of_q = static_cast<T>(1 - q < least() ? least() : 1 - q);
    const T of_p = static_cast<T>(1 - p < least() ? least() : 1 - p);
    const T lead = clamped ? of_p - of_q : static_cast<T>(difference);  // P's minus Q's
    const T larger = lead > T(0) ? of_p : of_q, smaller = lead > T(0) ? of_q : of_p;
    const T d = std::abs(lead) < T(0.5) * of_q ? std::log1p(lead / of_q) : std::log(of_p / of_q);
    return category_of<T, D>(larger, {smaller / larger, -std::abs(lead) / larger}, d, beta, rest, true);
  }
};

// The loss, and with kWrites the gradient outside the entries' columns.
template <class T, Divergence D, class Team, bool kWrites>
struct SparseDivergence {
  static constexpr int kStreams = 1, kSums = 0, kParts = kWrites ? 1 : 0;
  static constexpr bool kNormalizes = true;
  struct Row {
    Softmax<T> student;
    SparseRow<T> of;
    T base, share, loss, masses[2];
  };
  Sparse<T, D> sparse;
  T inverse_temperature;
  const T* scale;  // one number; may be null: 1
  T* loss;
  T* masses;  // [2, rows]
  int64_t rows;
  SparseStats<T> stats;
  Softmax<const T*> normals;  // may be null; else of the vocabulary, of which the student's columns are some

  FASTGEN_HD bool ignored(int64_t row) const { return sparse.ignored(row); }
  FASTGEN_HD void ignore(int64_t row) const {
    loss[row] = masses[row] = masses[rows + row] = T(0);
    stats.store(row, {}, {});
  }
  FASTGEN_HD Row row(int64_t row, const Softmax<T>* streams) const {
    Row r;
    r.student = normals.max ? Softmax<T>{normals.max[row], normals.sum[row]} : streams[0];
    r.of = sparse.template entries_of<Team>(row, r.student, &r.loss, r.masses);
    const T coefficient = (scale ? *scale : T(1)) * sparse.weight_of(row);
    r.base = base_of(r.student.max), r.loss *= coefficient;
    r.share = coefficient * sparse.gradient_scale() * r.of.outside / r.student.sum;
    return r;
  }
  FASTGEN_HD void element(const Row& row, const T* v, T* parts, T*) const {
    parts[0] = exp_of((v[0] - row.base) * inverse_temperature);
  }
  FASTGEN_HD void epilogue(int64_t row, Row& constants, const T*) const {
    loss[row] = constants.loss, masses[row] = constants.masses[0], masses[rows + row] = constants.masses[1];
    stats.store(row, constants.student, constants.of);
  }
  FASTGEN_HD T map(const Row& row, const T* parts) const { return row.share * parts[0]; }
};

// The same gradient from the stats and a number a row.
template <class T, Divergence D>
struct SparseDivergenceBackward {
  static constexpr int kStreams = 1, kSums = 0, kParts = 1;
  static constexpr bool kNormalizes = false;
  struct Row {
    T base, share;
  };
  Sparse<T, D> sparse;
  T inverse_temperature;
  const T* grad;
  SparseStats<T> stats;

  FASTGEN_HD bool ignored(int64_t row) const { return sparse.ignored(row); }
  FASTGEN_HD void ignore(int64_t) const {}
  FASTGEN_HD Row row(int64_t row, const Softmax<T>*) const {
    const T coefficient = grad[row] * sparse.weight_of(row) * sparse.gradient_scale();
    return {base_of(stats.student.max[row]), coefficient * stats.of.outside[row] / stats.student.sum[row]};
  }
  FASTGEN_HD void element(const Row& row, const T* v, T* parts, T*) const {
    parts[0] = exp_of((v[0] - row.base) * inverse_temperature);
  }
  FASTGEN_HD void epilogue(int64_t, Row&, const T*) const {}
  FASTGEN_HD T map(const Row& row, const T* parts) const { return row.share * parts[0]; }
};

// The gradients of the entries' columns: a formula of the scatter (skeleton/scatter.h).
template <class T, Divergence D>
struct SparseEntries {
  struct Row {
    SparseRow<T> of;
    T base, log_sum, coefficient;
  };
  Sparse<T, D> sparse;
  int64_t entries, columns;
  const T* scale;  // one number; may be null
  const T* grad;   // one a row; may be null
  SparseStats<T> stats;

  FASTGEN_HD bool ignored(int64_t row) const { return sparse.ignored(row); }
  FASTGEN_HD Row row(int64_t row) const {
    const T factor = (scale ? *scale : T(1)) * (grad ? grad[row] : T(1)) * sparse.weight_of(row);
    return {stats.load(row), base_of(stats.student.max[row]), std::log(stats.student.sum[row]),
            factor * sparse.gradient_scale()};
  }
  FASTGEN_HD int64_t column(int64_t row, int64_t k) const { return sparse.column(row, k); }
  FASTGEN_HD T value(const Row& row, int64_t index, int64_t k) const {
    const Softmax<T> log = sparse.logs(index, k, row.base, row.log_sum);
    const Category<T> c = category<T, D>(log.max - row.of.shift_q, log.sum - row.of.shift_p, sparse.beta, sparse.rest,
                                         sparse.tail != Tail::none);
    return row.coefficient * sparse.gradient(row.of, c);
  }
  // Without what the first entry's value has of the elements outside.
  FASTGEN_HD T again(const Row& row, int64_t index, int64_t k, T value) const {
    const Softmax<T> log = sparse.logs(index, k, row.base, row.log_sum);
    return value - row.coefficient * row.of.outside * exp_of(log.max);
  }
};

template <class T>
SparseStats<T> sparse_stats(const Tensor& stats, int64_t rows) {
  T* s = mutable_data<T>(stats);
  return {{s, s + rows}, {s + 2 * rows, s + 3 * rows, s + 4 * rows, s + 5 * rows}};
}

// Of one stream, [2, rows].
template <class T>
Softmax<const T*> normals_or_null(const std::optional<Tensor>& normals, int64_t rows) {
  const T* n = data_or_null<T>(normals);
  return {n, n ? n + rows : nullptr};
}

// The tensors of the two operators, as kernels read them.
struct SparseInputs {
  TokenRows<1> rows;
  ScalarType dtype;
  Tensor logprobs, ids;
  std::optional<Tensor> labels, weight;

  SparseInputs(const Tensor& student, const Tensor& teacher_logprobs, const Tensor& teacher_ids,
               const std::optional<Tensor>& row_labels, const std::optional<Tensor>& row_weight)
      : rows({student}),
        dtype(teacher_logprobs.scalar_type() == ScalarType::Double ? ScalarType::Double : rows.arithmetic()),
        logprobs(*row_scalars(teacher_logprobs, dtype)),
        ids(made_contiguous(teacher_ids)),
        labels(row_labels),
        weight(row_scalars(row_weight, dtype)) {
    if (labels) labels = made_contiguous(*labels);
  }

  template <class T, Divergence D>
  Sparse<T, D> sparse(double beta, int64_t tail, double temperature, int64_t ignore_index) const {
    return {rows.stream[0],
            static_cast<const T*>(logprobs.const_data_ptr()),
            static_cast<const int64_t*>(ids.const_data_ptr()),
            ids.size(-1),
            rows.size,
            labels_or_null(labels),
            ignore_index,
            data_or_null<T>(weight),
            T(beta),
            T(1 - beta),
            T(1 / temperature),
            option<Tail>(tail)};
  }
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_divergence(
    const Tensor& student, const Tensor& teacher_logprobs, const Tensor& teacher_ids,
    const std::optional<Tensor>& labels, const std::optional<Tensor>& weight, const std::optional<Tensor>& normals,
    const std::optional<Tensor>& scale, double beta, int64_t tail, double temperature, int64_t ignore_index,
    int64_t reduction, bool with_grad) {
  const SparseInputs inputs(student, teacher_logprobs, teacher_ids, labels, weight);
  Device::check_indices("teacher_ids", inputs.ids, inputs.rows.size);
  const int64_t rows = inputs.rows.count;
  const auto factor = row_scalars(scale, inputs.dtype), given = row_scalars(normals, inputs.dtype);
  const Tensor loss = new_per_row(student, inputs.dtype), masses = new_per_row(student, inputs.dtype, 2);
  const Tensor stats = new_per_row(student, inputs.dtype, 6);
  const Tensor grad = with_grad ? Device::new_logits(student) : new_vector(student, 0, student.scalar_type());
  return with_arithmetic(inputs.dtype, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    with_divergence(beta, [&](auto divergence) {
      constexpr Divergence D = decltype(divergence)::value;
      const Sparse<T, D> sparse = inputs.sparse<T, D>(beta, tail, temperature, ignore_index);
      const Output out = output_of(grad, with_grad);
      with_flag(with_grad, [&](auto writes) {
        const SparseDivergence<T, D, typename Device::Team, decltype(writes)::value> formula{
            sparse, sparse.inverse_temperature, data_or_null<T>(factor), mutable_data<T>(loss), mutable_data<T>(masses),
            rows, sparse_stats<T>(stats, rows), normals_or_null<T>(given, rows)};
        Device::template sweep<T>(formula, inputs.rows, out, inputs.rows.size);
      });
      if (with_grad)
        Device::template scatter<T>(SparseEntries<T, D>{sparse, sparse.entries, sparse.columns,
                                                        data_or_null<T>(factor), nullptr, sparse_stats<T>(stats, rows)},
                                    student, rows, out);
    });
    return {option<Reduction>(reduction) == Reduction::none ? loss : Device::template sum<T>(loss), masses, stats, grad};
  });
}

template <class Device>
Tensor sparse_divergence_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher_logprobs,
                                  const Tensor& teacher_ids, const std::optional<Tensor>& labels,
                                  const std::optional<Tensor>& weight, const Tensor& stats, double beta, int64_t tail,
                                  double temperature, int64_t ignore_index) {
  const SparseInputs inputs(student, teacher_logprobs, teacher_ids, labels, weight);
  const int64_t rows = inputs.rows.count;
  const auto row_grad = row_scalars(grad, inputs.dtype);
  const Tensor saved = made_contiguous(stats), grad_student = Device::new_logits(student);
  with_arithmetic(inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_divergence(beta, [&](auto divergence) {
      constexpr Divergence D = decltype(divergence)::value;
      const Sparse<T, D> sparse = inputs.sparse<T, D>(beta, tail, temperature, ignore_index);
      const SparseStats<T> of = sparse_stats<T>(saved, rows);
      const Output out{grad_student.mutable_data_ptr(), student.scalar_type()};
      Device::template sweep<T>(
          SparseDivergenceBackward<T, D>{sparse, sparse.inverse_temperature, data_or_null<T>(row_grad), of},
          inputs.rows, out, inputs.rows.size);
      Device::template scatter<T>(
          SparseEntries<T, D>{sparse, sparse.entries, sparse.columns, nullptr, data_or_null<T>(row_grad), of}, student,
          rows, out);
    });
  });
  return grad_student;
}

template <class Device>
void register_sparse_divergence(torch::stable::detail::StableLibrary& m) {
  m.impl("sparse_divergence", TORCH_BOX(&sparse_divergence<Device>));
  m.impl("sparse_divergence_backward", TORCH_BOX(&sparse_divergence_backward<Device>));
}

}  // namespace fastgen
