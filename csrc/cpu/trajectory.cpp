#include "../formulas/trajectory.h"

#include <tuple>

#include "../rows.h"
#include "minplus.h"
#include "monge.h"
#include "pool.h"

namespace fastgen::cpu {

namespace {

constexpr int64_t kSerialEntries = 1 << 15;  // a matrix that one thread reads sooner than others wake up

template <class Costs>
std::vector<typename Costs::Cost> each(const Costs& costs, int64_t problems) {
  std::vector<typename Costs::Cost> all;
  for (int64_t b = 0; b < problems; ++b) all.push_back(costs[b]);
  return all;
}

// Calls f with the vector of problems.
template <class F>
void with_problems(const Tensor& cost, const std::optional<Tensor>& h, int64_t first, const F& f) {
  with_arithmetic(cost.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(cost.const_data_ptr());
    const int64_t problems = cost.size(0), points = cost.size(1);
    if (h) f(each(FactoredCosts<T>{data, data_or_null<T>(h), points, first}, problems));
    else f(each(MatrixCosts<T>{data, points, first}, problems));
  });
}

Tensor new_table(const Tensor& like, int64_t size, ScalarType dtype) {
  const int64_t sizes[] = {size}, strides[] = {1};
  const auto bytes = static_cast<std::size_t>(size) * element_bytes(dtype);
  if (bytes < kPooledBytes) return empty_strided(like, sizes, strides, dtype);
  return torch::stable::from_blob(take_block(bytes), sizes, strides, like.device(), dtype, &give_block);
}

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
  static FASTGEN_HD void run(const CostCheck<T>& check, double*, int64_t begin, int64_t end) {
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
  static FASTGEN_HD void run(const CostCheck<T>& check, double*, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end && check.holds->load(std::memory_order_relaxed); ++s) {
      int64_t faults = 0;
      for (int64_t t = s + 1; t < check.nodes; ++t) faults |= entry_faults(check.cost, s, t, check.nodes);
      if (faults) check.holds->store(false, std::memory_order_relaxed);
    }
  }
};

template <class Check, class Job>
void in_parallel(const Job& job, int64_t rows) {
  if (rows * rows < kSerialEntries) run<Check>(job, nullptr, 0, rows);
  else torch::stable::parallel_for(0, rows, 32, [&](int64_t a, int64_t b) { run<Check>(job, nullptr, a, b); });
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

}  // namespace

std::tuple<Tensor, Tensor> trajectory_table(const Tensor& cost, const std::optional<Tensor>& h, int64_t first,
                                            int64_t edges, bool use_monge) {
  const int64_t problems = cost.size(0), nodes = cost.size(1) - first;
  const int64_t sizes[] = {problems, edges + 1}, strides[] = {edges + 1, 1};
  const auto dtype = cost.scalar_type();
  const Tensor totals = empty_strided(cost, sizes, strides, dtype);
  Tensor table;
  with_problems(cost, h, first, [&](auto costs) {
    using Cost = typename decltype(costs)::value_type;
    using T = typename Cost::Scalar;
    const int64_t size = use_monge ? Layers<T>::size(nodes, edges) : Panels<T>::size(nodes, edges);
    table = new_table(cost, problems * size, dtype);
    T* data = mutable_data<T>(table);
    if (!use_monge) minplus<Cost>(costs, data, nodes, edges);
    else
      torch::stable::parallel_for(0, problems, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) monge(costs[b], Layers<T>{data + b * size, nodes}, edges);
      });
    for (int64_t b = 0; b < problems; ++b) {
      T* to = mutable_data<T>(totals) + b * (edges + 1);
      if (use_monge) copy_totals(Layers<T>{data + b * size, nodes}, edges, to);
      else copy_totals(Panels<T>{data + b * size, nodes}, edges, to);
    }
  });
  return {totals, table};
}

// Per problem the faults of the costs that take part (csrc/formulas/trajectory.h: Fault).
Tensor trajectory_inspect(const Tensor& cost, const std::optional<Tensor>& h, int64_t first, bool certify) {
  const int64_t nodes = cost.size(1) - first;
  const Tensor status = new_vector(cost, cost.size(0), ScalarType::Long);
  int64_t* out = mutable_data<int64_t>(status);
  with_problems(cost, h, first, [&](const auto& costs) {
    for (const auto& problem : costs) *out++ = inspect(problem, nodes, certify);
  });
  return status;
}

Tensor trajectory_path(const Tensor& cost, const std::optional<Tensor>& h, const Tensor& table, int64_t first,
                       int64_t edges, bool use_monge) {
  const int64_t problems = cost.size(0), nodes = cost.size(1) - first;
  const int64_t sizes[] = {problems, edges + 1}, strides[] = {edges + 1, 1};
  const Tensor steps = empty_strided(cost, sizes, strides, ScalarType::Long);
  int64_t* out = mutable_data<int64_t>(steps);
  with_problems(cost, h, first, [&](auto costs) {
    using T = typename decltype(costs)::value_type::Scalar;
    T* data = mutable_data<T>(table);
    const int64_t size = problems > 0 ? table.numel() / problems : 0;
    torch::stable::parallel_for(0, problems, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        int64_t* path = out + b * (edges + 1);
        if (use_monge) recover_path(costs[b], Layers<T>{data + b * size, nodes}, edges, first, path);
        else recover_path(costs[b], Panels<T>{data + b * size, nodes}, edges, first, path);
      }
    });
  });
  return steps;
}

}  // namespace fastgen::cpu

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("trajectory_table", TORCH_BOX(&fastgen::cpu::trajectory_table));
  m.impl("trajectory_path", TORCH_BOX(&fastgen::cpu::trajectory_path));
  m.impl("trajectory_inspect", TORCH_BOX(&fastgen::cpu::trajectory_inspect));
}
