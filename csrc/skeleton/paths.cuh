// The operators of trajectories on a GPU; the Monge method is the CPU's alone.
#pragma once

#include "../runtime/rows.h"
#include "minplus.cuh"

namespace fastgen::cuda {

// The table of every problem; `totals` [problems, edges + 1] gets the costs of reaching the last node.
template <class Costs, class T>
Tensor solve_paths(const Costs& costs, const Tensor& like, int64_t nodes, int64_t edges, bool, T* totals) {
  const int64_t problems = like.size(0), columns = edges + 1, count = problems * columns;
  const Tensor table = new_vector(like, problems * nodes * columns, like.scalar_type());
  const Tensor best = new_vector(like, problems * nodes * columns, like.scalar_type());
  const Launch launch(like);
  T* paths = mutable_data<T>(table);
  minplus(launch, Tables<Costs>{costs, paths, mutable_data<T>(best), nodes, columns}, problems);
  launch(&copy_totals<T>, (count + kScanThreads - 1) / kScanThreads, dim3(kScanThreads), 0, 1,
         static_cast<const T*>(paths), nodes, columns, count, totals);
  return table;
}

// steps [problems, edges + 1], in which the first node counts as `costs.first`.
template <class Costs>
void find_paths(const Costs& costs, const Tensor& table, int64_t problems, int64_t nodes, int64_t edges, bool,
                int64_t* steps) {
  using T = typename Costs::Cost::Scalar;
  const int64_t columns = problems > 0 ? table.numel() / (problems * nodes) : 1;
  Launch{table}(&walk_back<Costs>, problems, dim3(kScanThreads), 256, 1,
                Tables<Costs>{costs, mutable_data<T>(table), nullptr, nodes, columns}, edges, steps);
}

// Per problem the faults of the costs that take part (costs.h: Fault).
template <class Costs>
void inspect_costs(const Costs& costs, const Tensor& like, int64_t problems, int64_t nodes, bool certify,
                   int64_t* status) {
  const int64_t rows = Costs::kFactored ? 1 : nodes;
  const Tensor faults = new_vector(like, problems * rows, ScalarType::Long);
  const Launch launch(like);
  launch(&find_faults<Costs>, problems * rows, dim3(kScanThreads), 256, 1, costs, nodes, rows,
         mutable_data<int64_t>(faults));
  launch(&collect_faults, problems, dim3(kScanThreads), 256, 1, static_cast<const int64_t*>(faults.const_data_ptr()),
         rows, certify, status);
}

}  // namespace fastgen::cuda
