// The trajectory operators on a GPU; the Monge method is the CPU's alone.
#pragma once

#include <tuple>

#include "../rows.h"
#include "minplus.cuh"

namespace fastgen::cuda {

// Calls f with the problems' costs.
template <class F>
void with_costs(const Tensor& cost, const std::optional<Tensor>& h, int64_t first, const F& f) {
  with_arithmetic(cost.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(cost.const_data_ptr());
    if (h) f(FactoredCosts<T>{data, data_or_null<T>(h), cost.size(1), first});
    else f(MatrixCosts<T>{data, cost.size(1), first});
  });
}

inline Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return empty_strided(like, sizes, strides, dtype);
}

inline std::tuple<Tensor, Tensor> trajectory_table(const Tensor& cost, const std::optional<Tensor>& h, int64_t first,
                                                   int64_t edges, bool) {
  const int64_t problems = cost.size(0), nodes = cost.size(1) - first, columns = edges + 1;
  const auto dtype = cost.scalar_type();
  const Tensor totals = new_matrix(cost, problems, columns, dtype);
  const Tensor table = new_vector(cost, problems * nodes * columns, dtype);
  const Tensor best = new_vector(cost, problems * nodes * columns, dtype);
  const Launch launch(cost);
  with_costs(cost, h, first, [&](const auto& costs) {
    using T = typename std::decay_t<decltype(costs)>::Cost::Scalar;
    T* paths = mutable_data<T>(table);
    minplus(launch, Tables<std::decay_t<decltype(costs)>>{costs, paths, mutable_data<T>(best), nodes, columns}, problems);
    const int64_t count = problems * columns;
    launch(&copy_totals<T>, (count + kScanThreads - 1) / kScanThreads, dim3(kScanThreads), 0, 1,
           static_cast<const T*>(paths), nodes, columns, count, mutable_data<T>(totals));
  });
  return {totals, table};
}

inline Tensor trajectory_path(const Tensor& cost, const std::optional<Tensor>& h, const Tensor& table, int64_t first,
                              int64_t edges, bool) {
  const int64_t problems = cost.size(0), nodes = cost.size(1) - first;
  const Tensor steps = new_matrix(cost, problems, edges + 1, ScalarType::Long);
  const Launch launch(cost);
  with_costs(cost, h, first, [&](const auto& costs) {
    using Costs = std::decay_t<decltype(costs)>;
    using T = typename Costs::Cost::Scalar;
    const int64_t columns = problems > 0 ? table.numel() / (problems * nodes) : 1;
    launch(&walk_back<Costs>, problems, dim3(kScanThreads), 256, 1,
           Tables<Costs>{costs, mutable_data<T>(table), nullptr, nodes, columns}, edges, mutable_data<int64_t>(steps));
  });
  return steps;
}

inline Tensor trajectory_inspect(const Tensor& cost, const std::optional<Tensor>& h, int64_t first, bool certify) {
  const int64_t problems = cost.size(0), nodes = cost.size(1) - first, rows = h ? 1 : nodes;
  const Tensor status = new_vector(cost, problems, ScalarType::Long);
  const Tensor faults = new_vector(cost, problems * rows, ScalarType::Long);
  const Launch launch(cost);
  with_costs(cost, h, first, [&](const auto& costs) {
    launch(&find_faults<std::decay_t<decltype(costs)>>, problems * rows, dim3(kScanThreads), 256, 1, costs, nodes, rows,
           mutable_data<int64_t>(faults));
  });
  launch(&collect_faults, problems, dim3(kScanThreads), 256, 1, static_cast<const int64_t*>(faults.const_data_ptr()),
         rows, certify, mutable_data<int64_t>(status));
  return status;
}

inline void register_trajectory(torch::stable::detail::StableLibrary& m) {
  m.impl("trajectory_table", TORCH_BOX(&trajectory_table));
  m.impl("trajectory_path", TORCH_BOX(&trajectory_path));
  m.impl("trajectory_inspect", TORCH_BOX(&trajectory_inspect));
}

}  // namespace fastgen::cuda
