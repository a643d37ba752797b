// The scatter on a GPU (scatter.h says what its formulas are): a block per row, a thread per entry.
//
// Who has the first entry of a column looks for its others, so there are no atomics: entries squared comparisons of a
// row, of integers that lie in the caches.
#pragma once

#include "../runtime/launch.h"
#include "../runtime/vector.cuh"

namespace fastgen::cuda {

constexpr int kScatterThreads = 128;  // of a block, whose registers nobody has to save on: without the 1, doubles spill

template <class T, class F>
__global__ void __launch_bounds__(kScatterThreads, 1) scatter_rows(const __grid_constant__ F formula, const Output out) {
  const int64_t row = blockIdx.x;
  if (formula.ignored(row)) return;
  const auto constants = formula.row(row);
  for (int64_t k = threadIdx.x; k < formula.entries; k += kScatterThreads) {
    const int64_t column = formula.column(row, k);
    if (column < 0 || column >= formula.columns) continue;
    int64_t first = 0;
    while (first < k && formula.column(row, first) != column) ++first;
    if (first < k) continue;
    T total = T(0);
#pragma unroll 1
    for (int64_t other = k; other < formula.entries; ++other) {
      if (formula.column(row, other) != column) continue;
      const T value = formula.value(constants, row, other);
      total = other == k ? value : total + formula.again(constants, row, other, value);
    }
    T one[kWidth<T>] = {total};
    store_single<T>(out, row * formula.columns + column, Span{0, 1, 1}, pack<T>(one, out.dtype));
  }
}

template <class T, class F>
void scatter(const F& formula, const Tensor& on, int64_t rows, const Output& out) {
  Launch{on}(&scatter_rows<T, F>, rows, dim3(kScatterThreads), 0, 1, formula, out);
}

}  // namespace fastgen::cuda
