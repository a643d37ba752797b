// The (min, +) skeleton on a CPU: the cheapest path of every number of edges at once.
//
// With C[t,k] the least cost of reaching node t from node 0 in k edges, C[t,k+1] = min over s < t of C[s,k] + F[s,t] is
// a triangular solve in the semiring (min, +), vectorised over k. The table is cut into panels of columns k and blocks of
// rows t. A task (block, panel) first takes the products of all earlier rows with the block's part of F, in register
// tiles, then finishes its rows one by one. It needs the same panel's earlier blocks, and in its second half the last
// column of the panel before: tasks are handed out in an order in which what they wait for has been handed out before,
// so one parallel region serves for the whole solve. Minima do not round, so the result does not depend on who did what.
#pragma once

#include <atomic>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "../runtime/isa.h"
#include "costs.h"

namespace fastgen::cpu {

constexpr int kPanelBytes = 192;  // three AVX-512 registers: eight rows of them accumulate in 24 of the 32
constexpr int64_t kBlock = 32;    // rows t that a task finishes
constexpr int64_t kStrip = 64;    // rows s whose edges are packed at a time: 16 KiB, beside 12 KiB of the panel, in L1
constexpr int64_t kSerialExtensions = 1 << 19;  // path extensions in a solve that threads are not woken for

// Runs Body<bytes of a vector register> for the best instruction set.
template <template <int> class Body, class Job>
void run_vectors(const Job& job, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512: return run_avx512<Body<64>>(job, begin, end);
    case Isa::avx2: return run_avx2<Body<32>>(job, begin, end);
    default: break;
  }
#endif
  run_baseline<Body<16>>(job, begin, end);
}

// The table C of one problem: panel p holds the columns [p * kWidth, (p + 1) * kWidth) of all rows, row after row. Only
// rows t >= p * kWidth of it are touched, because k edges reach no earlier node.
template <class T>
struct Panels {
  static constexpr int64_t kWidth = kPanelBytes / static_cast<int64_t>(sizeof(T));
  T* data;
  int64_t nodes;

  static int64_t count(int64_t edges) { return edges / kWidth + 1; }
  static int64_t size(int64_t nodes, int64_t edges) { return count(edges) * nodes * kWidth; }
  FASTGEN_HD T* row(int64_t panel, int64_t t) const { return data + (panel * nodes + t) * kWidth; }
  FASTGEN_HD T at(int64_t t, int64_t k) const { return row(k / kWidth, t)[k % kWidth]; }
};

struct Task {
  int64_t block, panel;
};

// Problems of one shape, and how far they are solved.
template <class Cost>
struct Solve {
  using T = typename Cost::Scalar;
  std::vector<Cost> costs;  // one per problem
  T* tables;
  int64_t nodes, edges;
  std::vector<Task> tasks;  // of one problem, in the order of execution
  mutable std::atomic<int64_t> next{0};
  std::vector<std::atomic<int64_t>> done;  // [problem, panel]: blocks finished

  Solve(std::vector<Cost> c, T* t, int64_t n, int64_t e) : costs(std::move(c)), tables(t), nodes(n), edges(e) {
    const int64_t panels = Panels<T>::count(edges);
    done = std::vector<std::atomic<int64_t>>(costs.size() * panels);
    // A panel has no tasks above the diagonal: those blocks count as finished.
    for (size_t i = 0; i < done.size(); ++i) done[i] = static_cast<int64_t>(i) % panels * Panels<T>::kWidth / kBlock;
    for (int64_t block = 0; block * kBlock < nodes; ++block)
      for (int64_t panel = 0; panel < panels && panel * Panels<T>::kWidth < std::min(nodes, (block + 1) * kBlock); ++panel)
        tasks.push_back({block, panel});
  }

  int64_t panels() const { return Panels<T>::count(edges); }
  Panels<T> table(int64_t problem) const { return {tables + problem * Panels<T>::size(nodes, edges), nodes}; }
  const std::atomic<int64_t>& progress(int64_t problem, int64_t panel) const { return done[problem * panels() + panel]; }
};

inline void wait_for(const std::atomic<int64_t>& progress, int64_t blocks) {
  for (int spins = 0; progress.load(std::memory_order_acquire) < blocks; ++spins) {
#if defined(__x86_64__)
    if (spins < 4096) {
      __builtin_ia32_pause();
      continue;
    }
#endif
    std::this_thread::yield();  // whoever is to finish it may be waiting for this core
  }
}

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <class T, int Bytes>
struct UnalignedVectorOf {
  typedef T type __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
};

// Rows of the register tile. 8 x 3 registers fill AVX-512's file; elsewhere 4 x 2 of 16 leave room for the operands.
template <int Bytes>
constexpr int kTileRows = Bytes == 64 ? 8 : 4;
template <int Bytes>
constexpr int kTileVectors = Bytes == 64 ? 3 : 2;

// The edges from rows [s0, s1) to the block at t0: edges[tile][s][row of the tile]. Beyond the last node, infinity.
template <int Bytes, class Cost>
FASTGEN_HD void pack_edges(const Cost& cost, int64_t s0, int64_t s1, int64_t t0, int64_t t1,
                           typename Cost::Scalar* edges) {
  using T = typename Cost::Scalar;
  constexpr int kRows = kTileRows<Bytes>;
  const bool full = t1 - t0 == kBlock;
  for (int64_t s = s0; s < s1; ++s)
    for (int64_t tile = 0; tile < kBlock / kRows; ++tile) {
      T* to = edges + (tile * kStrip + (s - s0)) * kRows;
      const int64_t t = t0 + tile * kRows;
      if (full)
        for (int r = 0; r < kRows; ++r) to[r] = cost.at(s, t + r);
      else
        for (int r = 0; r < kRows; ++r) to[r] = t + r < t1 ? cost.at(s, t + r) : kInfinity<T>;
    }
}

// best[r][:] = min(best[r][:], paths[s][:] extended by edges[s][r]) over `count` rows s, in registers.
template <int Bytes, int kVectors, class Cost>
FASTGEN_HD void extend_tile(const typename Cost::Scalar* paths, const typename Cost::Scalar* edges, int64_t count,
                            typename Cost::Scalar* best) {
  using T = typename Cost::Scalar;
  using V = typename VectorOf<T, Bytes>::type;
  constexpr int kRows = kTileRows<Bytes>, kLanes = Bytes / sizeof(T);
  constexpr int64_t kWidth = Panels<T>::kWidth;
  V least[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kVectors; ++j) least[r][j] = *reinterpret_cast<const V*>(best + r * kWidth + j * kLanes);
  for (int64_t s = 0; s < count; ++s, paths += kWidth, edges += kRows) {
    V from[kVectors];
    for (int j = 0; j < kVectors; ++j) from[j] = *reinterpret_cast<const V*>(paths + j * kLanes);
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kVectors; ++j) {
        V path;
        Cost::extend(from[j], edges[r], path);
        least[r][j] = path < least[r][j] ? path : least[r][j];
      }
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kVectors; ++j) *reinterpret_cast<V*>(best + r * kWidth + j * kLanes) = least[r][j];
}

// The first half of a task: the block's best paths whose last edge starts in an earlier block. The rows it reads may
// still be in the making, `progress` says how far: so threads work on several blocks even where there is one panel.
template <int Bytes, class Cost>
FASTGEN_HD void extend_earlier(const Cost& cost, const Panels<typename Cost::Scalar>& table, int64_t panel,
                               int64_t columns, const std::atomic<int64_t>& progress, int64_t t0, int64_t t1,
                               typename Cost::Scalar* best) {
  using T = typename Cost::Scalar;
  constexpr int kRows = kTileRows<Bytes>, kVectors = kTileVectors<Bytes>, kLanes = Bytes / sizeof(T);
  constexpr int64_t kWidth = Panels<T>::kWidth;
  static_assert(kWidth % (kVectors * kLanes) == 0 && kBlock % kRows == 0);
  alignas(64) T edges[kBlock * kStrip];
  for (int64_t s0 = panel * kWidth; s0 < t0; s0 += kStrip) {
    const int64_t s1 = std::min(s0 + kStrip, t0);
    pack_edges<Bytes>(cost, s0, s1, t0, t1, edges);
    wait_for(progress, (s1 + kBlock - 1) / kBlock);
    for (int64_t column = 0; column < columns; column += kVectors * kLanes)
      for (int64_t tile = 0; tile * kRows < t1 - t0; ++tile) {
        const T* paths = table.row(panel, s0) + column;
        const T* to = edges + tile * kStrip * kRows;
        T* least = best + tile * kRows * kWidth + column;
        if (columns - column <= kLanes) extend_tile<Bytes, 1, Cost>(paths, to, s1 - s0, least);
        else if (columns - column <= 2 * kLanes) extend_tile<Bytes, 2, Cost>(paths, to, s1 - s0, least);
        else extend_tile<Bytes, kVectors, Cost>(paths, to, s1 - s0, least);
      }
  }
}

// The second half: row by row, the edges within the block. C[t, k+1] is written one column to the right of where the
// paths C[s, k] are read, so a row's last value belongs to the next panel.
template <int Bytes, class Cost>
FASTGEN_HD void finish_rows(const Cost& cost, const Panels<typename Cost::Scalar>& table, int64_t panel, bool last,
                            int64_t t0, int64_t t1, const typename Cost::Scalar* best) {
  using T = typename Cost::Scalar;
  using V = typename VectorOf<T, Bytes>::type;
  constexpr int64_t kWidth = Panels<T>::kWidth;
  constexpr int kVectors = kPanelBytes / Bytes, kLanes = Bytes / sizeof(T);
  const int64_t first = std::max(t0, panel * kWidth);
  for (int64_t t = first; t < t1; ++t) {
    V least[kVectors];
    for (int j = 0; j < kVectors; ++j) least[j] = *reinterpret_cast<const V*>(best + (t - t0) * kWidth + j * kLanes);
    for (int64_t s = first; s < t; ++s) {
      const T edge = cost.at(s, t);
      const V* from = reinterpret_cast<const V*>(table.row(panel, s));
      for (int j = 0; j < kVectors; ++j) {
        V path;
        Cost::extend(from[j], edge, path);
        least[j] = path < least[j] ? path : least[j];
      }
    }
    alignas(64) T row[kWidth];
    for (int j = 0; j < kVectors; ++j) *reinterpret_cast<V*>(row + j * kLanes) = least[j];
    for (int64_t k = 0; k < kWidth; ++k) row[k] = cost.finish(row[k], t);
    T* to = table.row(panel, t);
    if (panel == 0) to[0] = t == 0 ? Cost::kStart : kInfinity<T>;
    std::memcpy(to + 1, row, (kWidth - 1) * sizeof(T));
    if (!last && t >= (panel + 1) * kWidth) *table.row(panel + 1, t) = row[kWidth - 1];
  }
}

template <int Bytes>
struct MinPlusWorker {
  template <class Cost>
  static FASTGEN_HD void run(const Solve<Cost>& solve, int64_t, int64_t) {
    using T = typename Cost::Scalar;
    const int64_t per_problem = static_cast<int64_t>(solve.tasks.size());
    const int64_t count = per_problem * static_cast<int64_t>(solve.costs.size());
    for (int64_t i; (i = solve.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      const int64_t problem = i / per_problem;
      const auto [block, panel] = solve.tasks[i % per_problem];
      const int64_t t0 = block * kBlock, t1 = std::min(t0 + kBlock, solve.nodes);
      alignas(64) T best[kBlock * Panels<T>::kWidth];
      for (T& b : best) b = kInfinity<T>;
      // Paths of all `edges` edges are not extended.
      const int64_t columns = std::min(Panels<T>::kWidth, solve.edges - panel * Panels<T>::kWidth);
      const auto& progress = solve.progress(problem, panel);
      extend_earlier<Bytes>(solve.costs[problem], solve.table(problem), panel, columns, progress, t0, t1, best);
      wait_for(progress, block);
      if (panel > 0) wait_for(solve.progress(problem, panel - 1), block + 1);
      finish_rows<Bytes>(solve.costs[problem], solve.table(problem), panel, panel + 1 == solve.panels(), t0, t1, best);
      const_cast<std::atomic<int64_t>&>(progress).store(block + 1, std::memory_order_release);
    }
  }
};

// Fills the tables of all problems; `tables` is aligned to 64 bytes and need not be initialised.
template <class Cost>
void minplus(std::vector<Cost> costs, typename Cost::Scalar* tables, int64_t nodes, int64_t edges) {
  const int64_t problems = static_cast<int64_t>(costs.size());
  const Solve<Cost> solve(std::move(costs), tables, nodes, edges);
  const int64_t extensions = problems * nodes * nodes / 2 * std::min(edges, nodes / 2);
  const int64_t threads = extensions <= kSerialExtensions ? 1 : torch::stable::get_num_threads();
  if (threads == 1) return run_vectors<MinPlusWorker>(solve, 0, 1);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { run_vectors<MinPlusWorker>(solve, 0, 1); });
}

}  // namespace fastgen::cpu
