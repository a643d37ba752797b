// The two kinds of edge cost of a trajectory problem, as semirings: what an edge (s, t) is, how it extends a path, and
// what is left to do once the best predecessor of t is known.
//
//   struct Cost {
//     using Scalar;
//     static constexpr Scalar kStart;          // the cost of the empty path
//     Scalar at(int64_t s, int64_t t) const;   // the edge, for s < t
//     static void extend(c, edge, out);        // out = a path of cost c, and the edge; c and out may be vectors
//     Scalar finish(Scalar best, int64_t t) const;  // what all paths to t have in common
//   };
#pragma once

#include <cstdint>
#include <limits>

#include "formula.h"

namespace fastgen {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Costs F[s,t] from a matrix: the semiring (min, +).
template <class T>
struct MatrixCost {
  using Scalar = T;
  static constexpr T kStart = T(0);
  const T* data;
  int64_t row_stride;

  FASTGEN_HD T at(int64_t s, int64_t t) const { return data[s * row_stride + t]; }
  template <class C, class E>
  static FASTGEN_HD void extend(const C& c, const E& edge, C& out) {
    out = c + edge;
  }
  FASTGEN_HD T finish(T best, int64_t) const { return best; }
};

// F[s,t] = log((v_s + h_t) / (v_t + h_t)) from two vectors. Paths carry exp(cost), so that an edge costs one product and
// no logarithm: the semiring (min, ×), exact to an ulp an edge and equal to the bit wherever IEEE arithmetic is. For v
// non-decreasing the products telescope between (v_0 + min h)/(v_N + max h) and 1: they neither over- nor underflow.
template <class T>
struct FactoredCost {
  using Scalar = T;
  static constexpr T kStart = T(1);
  const T* v;
  const T* h;

  FASTGEN_HD T at(int64_t s, int64_t t) const { return v[s] + h[t]; }
  template <class C, class E>
  static FASTGEN_HD void extend(const C& c, const E& edge, C& out) {
    out = c * edge;
  }
  // Every edge into t has the denominator v_t + h_t, which therefore does not take part in the comparison.
  FASTGEN_HD T finish(T best, int64_t t) const { return best / (v[t] + h[t]); }
};

// The costs of several problems, from their node `first` on: matrices [B, points, points], or v and h [B, points].
template <class T>
struct MatrixCosts {
  using Cost = MatrixCost<T>;
  static constexpr bool kFactored = false;
  const T* data;
  int64_t points, first;

  FASTGEN_HD Cost operator[](int64_t problem) const {
    return {data + (problem * points + first) * points + first, points};
  }
};

template <class T>
struct FactoredCosts {
  using Cost = FactoredCost<T>;
  static constexpr bool kFactored = true;
  const T *v, *h;
  int64_t points, first;

  FASTGEN_HD Cost operator[](int64_t problem) const {
    return {v + problem * points + first, h + problem * points + first};
  }
};

// a + b with what its rounding loses (Knuth's two-sum): pairs compare as the exact sums do.
template <class T>
struct ExactSum {
  T value, rest;

  FASTGEN_HD ExactSum(T a, T b) {
    value = a + b;
    const T b_part = value - a;
    rest = (a - (value - b_part)) + (b - b_part);
  }
  FASTGEN_HD bool operator<(const ExactSum& other) const {
    return value < other.value || (value == other.value && rest < other.rest);
  }
};

// What can be wrong with a problem's costs: bits of trajectory_inspect's answer.
enum Fault : int64_t {
  kInvalid = 1,     // NaN or -inf; of a factored cost: a v_s + h_t that is not positive, or not finite
  kUncertified = 2,  // the quadrangle inequality is not known to hold; only told of valid costs, where asked
  kDecreasing = 4,  // v decreases somewhere
  kRange = 8,       // products of a factored cost may leave the range of the arithmetic
};

FASTGEN_HD int64_t reported(int64_t faults, bool certify) {
  return certify && !(faults & kInvalid) ? faults : faults & ~int64_t(kUncertified);
}

// Faults of node t >= 1: h_t, and v up to it.
template <class T>
FASTGEN_HD int64_t node_faults(const FactoredCost<T>& cost, int64_t t, int64_t nodes) {
  constexpr T kSmallest = sizeof(T) == 8 ? T(0x1p-480) : T(0x1p-56);
  const T low = cost.v[0] + cost.h[t], high = cost.v[nodes - 1] + cost.h[t];
  int64_t faults = low > T(0) && cost.v[t] + cost.h[t] < kInfinity<T> ? 0 : kInvalid;
  if (t > 1 && !(cost.h[t - 1] <= cost.h[t])) faults |= kUncertified;
  if (!(cost.v[t - 1] <= cost.v[t])) faults |= kDecreasing;
  return low > kSmallest && high < 1 / kSmallest ? faults : faults | kRange;
}

// Faults of the entry (s, t), s < t. The cell (s, s + 1) x (t, t + 1) of the quadrangle inequality belongs to it: with
// s + 1 < t all cells imply the inequality for s < s' < t < t'. It is checked exactly, and refused for infinite costs.
template <class T>
FASTGEN_HD int64_t entry_faults(const MatrixCost<T>& cost, int64_t s, int64_t t, int64_t nodes) {
  const T f = cost.at(s, t);
  if (!(f > -kInfinity<T>)) return kInvalid;
  if (f == kInfinity<T>) return kUncertified;
  if (s + 1 >= t || t + 1 >= nodes) return 0;
  const ExactSum<T> straight(f, cost.at(s + 1, t + 1)), crossed(cost.at(s, t + 1), cost.at(s + 1, t));
  return crossed < straight ? kUncertified : 0;
}

}  // namespace fastgen
