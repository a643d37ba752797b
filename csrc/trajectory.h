// Trajectories: the cheapest paths of every number of edges (skeleton/costs.h: what an edge costs).
#pragma once

#include <tuple>

#include "runtime/device.h"
#include "skeleton/costs.h"

namespace fastgen {

// Calls f with the problems' costs: a matrix each, or with `h` two vectors each.
template <class F>
void with_costs(const Tensor& cost, const std::optional<Tensor>& h, int64_t first, const F& f) {
  with_arithmetic(cost.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(cost.const_data_ptr());
    if (h) f(FactoredCosts<T>{data, data_or_null<T>(h), cost.size(1), first});
    else f(MatrixCosts<T>{data, cost.size(1), first});
  });
}

template <class Device>
std::tuple<Tensor, Tensor> trajectory_table(const Tensor& cost, const std::optional<Tensor>& h, int64_t first,
                                            int64_t edges, bool use_monge) {
  const int64_t nodes = cost.size(1) - first;
  const Tensor totals = new_matrix(cost, cost.size(0), edges + 1, cost.scalar_type());
  Tensor table;
  with_costs(cost, h, first, [&](const auto& costs) {
    using T = typename std::decay_t<decltype(costs)>::Cost::Scalar;
    table = Device::solve_paths(costs, cost, nodes, edges, use_monge, mutable_data<T>(totals));
  });
  return {totals, table};
}

template <class Device>
Tensor trajectory_path(const Tensor& cost, const std::optional<Tensor>& h, const Tensor& table, int64_t first,
                       int64_t edges, bool use_monge) {
  const int64_t problems = cost.size(0), nodes = cost.size(1) - first;
  const Tensor steps = new_matrix(cost, problems, edges + 1, ScalarType::Long);
  with_costs(cost, h, first, [&](const auto& costs) {
    Device::find_paths(costs, table, problems, nodes, edges, use_monge, mutable_data<int64_t>(steps));
  });
  return steps;
}

template <class Device>
Tensor trajectory_inspect(const Tensor& cost, const std::optional<Tensor>& h, int64_t first, bool certify) {
  const int64_t problems = cost.size(0), nodes = cost.size(1) - first;
  const Tensor status = new_vector(cost, problems, ScalarType::Long);
  with_costs(cost, h, first, [&](const auto& costs) {
    Device::inspect_costs(costs, cost, problems, nodes, certify, mutable_data<int64_t>(status));
  });
  return status;
}

template <class Device>
void register_trajectory(torch::stable::detail::StableLibrary& m) {
  m.impl("trajectory_table", TORCH_BOX(&trajectory_table<Device>));
  m.impl("trajectory_path", TORCH_BOX(&trajectory_path<Device>));
  m.impl("trajectory_inspect", TORCH_BOX(&trajectory_inspect<Device>));
}

}  // namespace fastgen
