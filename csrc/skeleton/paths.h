// The operators of trajectories on a CPU: tables by the skeleton or by the Monge method, paths, and what is wrong with
// costs.
#pragma once

#include "../runtime/pooled.h"
#include "minplus.h"
#include "monge.h"

namespace fastgen::cpu {

constexpr int64_t kSerialEntries = 1 << 15;  // a matrix that one thread reads sooner than others wake up

// The costs of reaching the last node in 0 .. edges edges.
template <class T, class Table>
void copy_totals(const Table& table, int64_t edges, T* totals) {
  for (int64_t k = 0; k <= edges; ++k) totals[k] = k < table.nodes ? table.at(table.nodes - 1, k) : kInfinity<T>;
}

// A property of a cost matrix that rows [begin, end) are checked for.
template <class T>
struct CostCheck {
  MatrixCost<T> cost;
  int64_t nodes;
  std::atomic<bool>* holds;
};

// No NaN and no -inf where s < t.
struct CheckValues {
  template <class T>
  static FASTGEN_HD void run(const CostCheck<T>& check, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const T* row = check.cost.data + s * check.cost.row_stride;
      bool valid = true;
      for (int64_t t = s + 1; t < check.nodes; ++t) valid &= row[t] > -kInfinity<T>;
      if (!valid) check.holds->store(false, std::memory_order_relaxed);
    }
  }
};

// The quadrangle inequality, for valid costs.
struct CheckMonge {
  template <class T>
  static FASTGEN_HD void run(const CostCheck<T>& check, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end && check.holds->load(std::memory_order_relaxed); ++s) {
      int64_t faults = 0;
      for (int64_t t = s + 1; t < check.nodes; ++t) faults |= entry_faults(check.cost, s, t, check.nodes);
      if (faults) check.holds->store(false, std::memory_order_relaxed);
    }
  }
};

template <class Check, class Job>
void in_parallel(const Job& job, int64_t rows) {
  if (rows * rows < kSerialEntries) run<Check>(job, int64_t{0}, rows);
  else torch::stable::parallel_for(0, rows, 32, [&](int64_t a, int64_t b) { run<Check>(job, a, b); });
}

template <class T>
int64_t inspect(const MatrixCost<T>& cost, int64_t nodes, bool certify) {
  std::atomic<bool> valid{true}, certified{true};
  in_parallel<CheckValues>(CostCheck<T>{cost, nodes, &valid}, nodes);
  if (certify && valid) in_parallel<CheckMonge>(CostCheck<T>{cost, nodes, &certified}, nodes);
  return (valid ? 0 : kInvalid) + (certified ? 0 : kUncertified);
}

template <class T>
int64_t inspect(const FactoredCost<T>& cost, int64_t nodes, bool certify) {
  int64_t faults = 0;
  for (int64_t t = 1; t < nodes; ++t) faults |= node_faults(cost, t, nodes);
  return reported(faults, certify);
}

// Walks back from the last node: the predecessor is the lowest s whose path and edge give the table's value.
template <class Cost, class Table>
void recover_path(const Cost& cost, const Table& table, int64_t edges, int64_t first, int64_t* steps) {
  using T = typename Cost::Scalar;
  int64_t t = table.nodes - 1;
  steps[edges] = t + first;
  for (int64_t k = edges; k > 0; --k) {
    const T wanted = table.at(t, k);
    int64_t s = k - 1;
    for (; s < t; ++s) {
      T path;
      Cost::extend(table.at(s, k - 1), cost.at(s, t), path);
      if (cost.finish(path, t) == wanted) break;
    }
    t = s;
    steps[k - 1] = t + first;
  }
}

// The table of every problem; `totals` [problems, edges + 1] gets the costs of reaching the last node.
template <class Costs, class T>
Tensor solve_paths(const Costs& costs, const Tensor& like, int64_t nodes, int64_t edges, bool use_monge, T* totals) {
  using Cost = typename Costs::Cost;
  const int64_t problems = like.size(0);
  const int64_t size = use_monge ? Layers<T>::size(nodes, edges) : Panels<T>::size(nodes, edges);
  const int64_t sizes[] = {problems * size}, strides[] = {1};
  const Tensor table = pooled(like, sizes, strides, like.scalar_type());
  T* data = mutable_data<T>(table);
  if (use_monge) {
    torch::stable::parallel_for(0, problems, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) monge(costs[b], Layers<T>{data + b * size, nodes}, edges);
    });
  } else {
    std::vector<Cost> each;
    for (int64_t b = 0; b < problems; ++b) each.push_back(costs[b]);
    minplus<Cost>(each, data, nodes, edges);
  }
  for (int64_t b = 0; b < problems; ++b) {
    T* to = totals + b * (edges + 1);
    if (use_monge) copy_totals(Layers<T>{data + b * size, nodes}, edges, to);
    else copy_totals(Panels<T>{data + b * size, nodes}, edges, to);
  }
  return table;
}

// steps [problems, edges + 1], in which the first node counts as `costs.first`.
template <class Costs>
void find_paths(const Costs& costs, const Tensor& table, int64_t problems, int64_t nodes, int64_t edges, bool use_monge,
                int64_t* steps) {
  using T = typename Costs::Cost::Scalar;
  T* data = mutable_data<T>(table);
  const int64_t size = problems > 0 ? table.numel() / problems : 0;
  torch::stable::parallel_for(0, problems, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t* path = steps + b * (edges + 1);
      if (use_monge) recover_path(costs[b], Layers<T>{data + b * size, nodes}, edges, costs.first, path);
      else recover_path(costs[b], Panels<T>{data + b * size, nodes}, edges, costs.first, path);
    }
  });
}

// Per problem the faults of the costs that take part (costs.h: Fault).
template <class Costs>
void inspect_costs(const Costs& costs, const Tensor&, int64_t problems, int64_t nodes, bool certify, int64_t* status) {
  for (int64_t b = 0; b < problems; ++b) status[b] = inspect(costs[b], nodes, certify);
}

}  // namespace fastgen::cpu
