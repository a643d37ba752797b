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

#include "formula.h"

namespace fastgen {

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

}  // namespace fastgen
