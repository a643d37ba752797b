// The (min, +) skeleton on a GPU: the triangular solve of minplus.h by two launches a block of rows.
//
// When the rows [t0, t0 + kRows) of the table have gathered what all earlier rows contribute, finish_rows makes them
// final, and extend_rows adds their contribution to all later rows. Gathered and final values live in two arrays: rows
// that one block of threads makes final, its neighbours still read as gathered. Minima do not round, so the result is
// to the bit that of a plain loop over k.
//
//   paths[t][k]   final: the least cost of reaching t in k edges                          [problem, nodes, columns]
//   best[t][k]    gathered: the least cost of k edges to an earlier row and one to t; only k < t0 is there
#pragma once

#include "../runtime/launch.h"
#include "costs.h"

namespace fastgen::cuda {

constexpr int kRows = 32;     // rows made final by one launch
constexpr int kOwn = 96;      // columns k that a block of threads makes final
constexpr int kHalo = kRows;  // and those before them, which it computes too: a row lends its column to the next row's
                              // next column, so after kRows rows as many columns at the left are wrong
constexpr int kFinishThreads = kOwn + kHalo;
constexpr int kAhead = 8;     // rows whose gathered values are on their way, as rows follow one another
constexpr int kTile = 64;     // rows and columns of extend_rows's tile: 4 x 4 values a thread
constexpr int kExtendThreads = 256;
constexpr int kScanThreads = 256;

// What launches of one solve share.
template <class Costs>
struct Tables {
  using Cost = typename Costs::Cost;
  using T = typename Cost::Scalar;
  Costs costs;
  T* paths;
  T* best;
  int64_t nodes, columns;  // columns: one more than edges

  FASTGEN_HD int64_t row(int64_t problem, int64_t t) const { return (problem * nodes + t) * columns; }
};

template <class T>
constexpr int kFinishShared = (kRows * kFinishThreads + kRows * kRows) * static_cast<int>(sizeof(T));

template <class Costs>
__global__ void __launch_bounds__(kFinishThreads) finish_rows(const Tables<Costs> tables, int64_t t0, int64_t tiles) {
  using Cost = typename Costs::Cost;
  using T = typename Cost::Scalar;
  extern __shared__ double finish_memory[];
  T* rows = reinterpret_cast<T*>(finish_memory);  // [row of the block][column here]: paths
  T* edges = rows + kRows * kFinishThreads;       // [to][from]
  const int64_t problem = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const Cost cost = tables.costs[problem];
  const int here = static_cast<int>(threadIdx.x);
  const int64_t k = tile * kOwn - kHalo + here, edges_most = tables.columns - 1;
  const int count = tables.nodes - t0 < kRows ? static_cast<int>(tables.nodes - t0) : kRows;
  for (int e = here; e < kRows * kRows; e += kFinishThreads) {
    const int to = e / kRows, from = e % kRows;
    edges[e] = from < to && to < count ? cost.at(t0 + from, t0 + to) : kInfinity<T>;
  }
  // Columns that nobody here writes: the leftmost, and k = 0.
  if (here == 0 || k <= 0)
    for (int i = 0; i < count; ++i) {
      const T value = k == 0 && t0 + i == 0 ? Cost::kStart : kInfinity<T>;
      rows[i * kFinishThreads + here] = value;
      if (k == 0) tables.paths[tables.row(problem, t0 + i)] = value;
    }
  const auto at = [&](int i) { return tables.row(problem, t0 + i) + k; };
  const bool gathers = k >= 0 && k < t0 && k < edges_most;
  const auto gathered = [&](int i) { return gathers && i < count ? tables.best[at(i)] : kInfinity<T>; };
  T ahead[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) ahead[u] = gathered(u);
  __syncthreads();
  for (int first = 0; first < count; first += kAhead) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = first + u;
      if (i >= count) break;
      T least = ahead[u];
      ahead[u] = gathered(i + kAhead);
      for (int j = 0; j < i; ++j) {
        T path;
        Cost::extend(rows[j * kFinishThreads + here], edges[i * kRows + j], path);
        least = path < least ? path : least;
      }
      least = cost.finish(least, t0 + i);
      if (k >= 0 && here + 1 < kFinishThreads) rows[i * kFinishThreads + here + 1] = least;
      if (here >= kHalo && k < edges_most) tables.paths[at(i) + 1] = least;
      __syncthreads();
    }
  }
}

template <class T>
constexpr int kExtendShared = 2 * kRows * kTile * static_cast<int>(sizeof(T));

// best[t][k] = min(best[t][k], paths[s][k] extended by the edge (s, t)) over the rows s in [t0, t0 + kRows), for all
// later t and k <= s.
template <class Costs>
__global__ void __launch_bounds__(kExtendThreads)
    extend_rows(const Tables<Costs> tables, int64_t t0, int64_t row_tiles, int64_t column_tiles) {
  using Cost = typename Costs::Cost;
  using T = typename Cost::Scalar;
  constexpr int kSide = 16, kEach = kTile / kSide;
  extern __shared__ double extend_memory[];
  T* paths = reinterpret_cast<T*>(extend_memory);  // [s][k]
  T* edges = paths + kRows * kTile;                // [s][t]
  const int64_t problem = blockIdx.x / (row_tiles * column_tiles), tile = blockIdx.x % (row_tiles * column_tiles);
  const int64_t first_t = t0 + kRows + tile / column_tiles * kTile, first_k = tile % column_tiles * kTile;
  const Cost cost = tables.costs[problem];
  for (int e = static_cast<int>(threadIdx.x); e < kRows * kTile; e += kExtendThreads) {
    const int64_t s = t0 + e / kTile, t = first_t + e % kTile, k = first_k + e % kTile;
    paths[e] = k < tables.columns ? tables.paths[tables.row(problem, s) + k] : kInfinity<T>;
    edges[e] = t < tables.nodes ? cost.at(s, t) : kInfinity<T>;
  }
  __syncthreads();
  const int column = threadIdx.x % kSide, row = threadIdx.x / kSide;
  T least[kEach][kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) least[i][j] = kInfinity<T>;
#pragma unroll 4
  for (int s = 0; s < kRows; ++s) {
    T from[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) from[j] = paths[s * kTile + column + j * kSide];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const T edge = edges[s * kTile + row + i * kSide];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        T path;
        Cost::extend(from[j], edge, path);
        least[i][j] = path < least[i][j] ? path : least[i][j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t t = first_t + row + i * kSide;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t k = first_k + column + j * kSide;
      if (t >= tables.nodes || k + 1 >= tables.columns) continue;
      T* to = tables.best + tables.row(problem, t) + k;
      // Earlier launches have gathered the columns before t0.
      *to = k < t0 && *to < least[i][j] ? *to : least[i][j];
    }
  }
}

// Fills `tables.paths` of all problems.
template <class Costs>
void minplus(const Launch& launch, const Tables<Costs>& tables, int64_t problems) {
  using T = typename Costs::Cost::Scalar;
  const int64_t edges = tables.columns - 1, tiles = std::max<int64_t>((edges + kOwn - 1) / kOwn, 1);
  for (int64_t t0 = 0; t0 < tables.nodes; t0 += kRows) {
    launch(&finish_rows<Costs>, problems * tiles, dim3(kFinishThreads), kFinishShared<T>, 1, tables, t0, tiles);
    const int64_t later = tables.nodes - t0 - kRows;
    const int64_t row_tiles = later > 0 ? (later + kTile - 1) / kTile : 0;
    const int64_t column_tiles = (std::min(t0 + kRows, edges) + kTile - 1) / kTile;
    launch(&extend_rows<Costs>, problems * row_tiles * column_tiles, dim3(kExtendThreads), kExtendShared<T>, 1, tables,
           t0, row_tiles, column_tiles);
  }
}

__device__ __forceinline__ int64_t least_in_block(int64_t x, int64_t* warps) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const int64_t other = __shfl_xor_sync(~0u, x, offset);
    x = other < x ? other : x;
  }
  __syncthreads();  // the last call's values have been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < kScanThreads / 32; ++w) x = warps[w] < x ? warps[w] : x;
  return x;
}

// One block a problem walks its path back: the predecessor is the lowest s that gives the table's value.
template <class Costs>
__global__ void __launch_bounds__(kScanThreads) walk_back(const Tables<Costs> tables, int64_t edges, int64_t* steps) {
  using Cost = typename Costs::Cost;
  using T = typename Cost::Scalar;
  extern __shared__ int64_t walk_memory[];
  int64_t* warps = walk_memory;
  const int64_t problem = blockIdx.x;
  const Cost cost = tables.costs[problem];
  int64_t t = tables.nodes - 1;
  int64_t* path = steps + problem * (edges + 1);
  if (threadIdx.x == 0) path[edges] = t + tables.costs.first;
  for (int64_t k = edges; k > 0; --k) {
    const T wanted = tables.paths[tables.row(problem, t) + k];
    int64_t found = t;
    for (int64_t start = k - 1; start < t && found == t; start += kScanThreads) {
      const int64_t s = start + threadIdx.x;
      T here = kInfinity<T>;
      if (s < t) Cost::extend(tables.paths[tables.row(problem, s) + k - 1], cost.at(s, t), here);
      found = least_in_block(s < t && cost.finish(here, t) == wanted ? s : t, warps);
    }
    t = found;
    if (threadIdx.x == 0) path[k - 1] = t + tables.costs.first;
  }
}

// Faults (csrc/skeleton/costs.h) of the entries of a row, or of all nodes of a factored cost: one block each.
template <class T>
FASTGEN_HD int64_t faults_at(const MatrixCost<T>& cost, int64_t s, int64_t t, int64_t nodes) {
  return entry_faults(cost, s, t, nodes);
}
template <class T>
FASTGEN_HD int64_t faults_at(const FactoredCost<T>& cost, int64_t, int64_t t, int64_t nodes) {
  return node_faults(cost, t, nodes);
}

template <class Costs>
__global__ void __launch_bounds__(kScanThreads)
    find_faults(const Costs costs, int64_t nodes, int64_t rows, int64_t* faults) {
  extern __shared__ int64_t faults_memory[];
  const int64_t problem = blockIdx.x / rows, s = blockIdx.x % rows;
  const auto cost = costs[problem];
  int64_t mine = 0;
  for (int64_t t = s + 1 + threadIdx.x; t < nodes; t += kScanThreads) mine |= faults_at(cost, s, t, nodes);
  int64_t all = 0;
  for (int64_t bit : {kInvalid, kUncertified, kDecreasing, kRange})
    all |= -least_in_block(mine & bit ? -bit : 0, faults_memory);
  if (threadIdx.x == 0) faults[blockIdx.x] = all;
}

static __global__ void __launch_bounds__(kScanThreads)
    collect_faults(const int64_t* faults, int64_t rows, bool certify, int64_t* status) {
  extern __shared__ int64_t collect_memory[];
  int64_t mine = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kScanThreads) mine |= faults[blockIdx.x * rows + i];
  int64_t all = 0;
  for (int64_t bit : {kInvalid, kUncertified, kDecreasing, kRange})
    all |= -least_in_block(mine & bit ? -bit : 0, collect_memory);
  if (threadIdx.x == 0) status[blockIdx.x] = reported(all, certify);
}

template <class T>
__global__ void __launch_bounds__(kScanThreads)
    copy_totals(const T* paths, int64_t nodes, int64_t columns, int64_t count, T* totals) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kScanThreads) + threadIdx.x;
  if (i < count) totals[i] = paths[((i / columns + 1) * nodes - 1) * columns + i % columns];
}

}  // namespace fastgen::cuda
