// The forward process and conversions between predictions: per-row linear combinations.
#pragma once

#include "formula.h"

namespace fastgen {

// out = a_i * x + b_i * y
template <class T>
struct RowCombination {
  static constexpr int kStreams = 2, kSums = 0, kMapStreams = 2;
  struct Row {
    T a, b;
  };
  const T* a;
  const T* b;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return {a[row], b[row]}; }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row&, T) const { return T(0); }
  FASTGEN_HD T map(const Row& row, T, const T* v) const { return row.a * v[0] + row.b * v[1]; }
};

// out = a_i * x
template <class T>
struct RowScaled {
  static constexpr int kStreams = 1, kSums = 0, kMapStreams = 1;
  struct Row {
    T a;
  };
  const T* a;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return {a[row]}; }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row& row, T) const { return row.a; }
  FASTGEN_HD T map(const Row&, T coefficient, const T* v) const { return coefficient * v[0]; }
};

}  // namespace fastgen
