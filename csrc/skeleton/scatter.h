// A scatter on a CPU: after a map over rows of logits, a few columns of each row are written again, or added to.
//
//   template <class T> struct Formula {
//     struct Row { ... };                          // constants of a row
//     int64_t entries, columns;                    // of a row
//     bool ignored(int64_t row) const;             // nothing of the row is written
//     Row row(int64_t row) const;
//     int64_t column(int64_t row, int64_t k) const;             // of entry k; out of range: none
//     T value(const Row&, int64_t row, int64_t k) const;        // replaces the element, for the column's first entry
//     T again(const Row&, int64_t row, int64_t k, T value) const;  // what another entry of that column adds
//   };
//
// Entries of one column are added in their order, and their sum is rounded once.
#pragma once

#include <vector>

#include "../runtime/convert.h"
#include "rowwise.h"

namespace fastgen::cpu {

constexpr int64_t kEntriesPerTask = 2048;  // fewer are not worth another thread

template <class T, class F>
void scatter_row(const F& formula, int64_t row, const Output& out, int32_t* first, T* totals) {
  if (formula.ignored(row)) return;
  const auto constants = formula.row(row);
  for (int64_t k = 0; k < formula.entries; ++k) {
    const int64_t column = formula.column(row, k);
    if (column < 0 || column >= formula.columns) continue;
    const T value = formula.value(constants, row, k);
    if (first[column] < 0) first[column] = static_cast<int32_t>(k), totals[k] = value;
    else totals[first[column]] += formula.again(constants, row, k, value);
  }
  for (int64_t k = 0; k < formula.entries; ++k) {
    const int64_t column = formula.column(row, k);
    if (column < 0 || column >= formula.columns || first[column] < 0) continue;
    store<T>(out.data, out.dtype, row * formula.columns + column, 1, totals + first[column], false);
    first[column] = -1;
  }
}

// Runs `formula` over the rows of `out`, [rows, formula.columns].
template <class T, class F>
void scatter(const F& formula, int64_t rows, const Output& out) {
  const auto some = [&](int64_t begin, int64_t end) {
    std::vector<int32_t> first(formula.columns, -1);
    std::vector<T> totals(formula.entries);
    for (int64_t row = begin; row < end; ++row) scatter_row(formula, row, out, first.data(), totals.data());
  };
  const int64_t grain = std::max<int64_t>(1, kEntriesPerTask / std::max<int64_t>(formula.entries, 1));
  if (rows <= grain) some(0, rows);
  else torch::stable::parallel_for(0, rows, grain, some);
}

}  // namespace fastgen::cpu
