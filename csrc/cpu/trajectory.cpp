#include "../formulas/trajectory.h"

#include <tuple>

#include "../rows.h"
#include "minplus.h"
#include "monge.h"
#include "pool.h"

namespace fastgen::cpu {

namespace {

constexpr int64_t kSerialElements = 1 << 15;  // a matrix that one thread reads sooner than others wake up

// The edge costs of each problem: matrices [B, N+1, N+1], or with `h` the vectors v and h [B, N+1]. Nodes before
// `first` do not take part, so they are skipped where the data begins.
template <class T>
std::vector<MatrixCost<T>> matrices(const Tensor& cost, int64_t first) {
  std::vector<MatrixCost<T>> problems;
  const int64_t points = cost.size(1);
  for (int64_t b = 0; b < cost.size(0); ++b)
    problems.push_back({static_cast<const T*>(cost.const_data_ptr()) + (b * points + first) * points + first, points});
  return problems;
}

template <class T>
std::vector<FactoredCost<T>> factored(const Tensor& v, const Tensor& h, int64_t first) {
  std::vector<FactoredCost<T>> problems;
  const int64_t points = v.size(1);
  for (int64_t b = 0; b < v.size(0); ++b)
    problems.push_back({static_cast<const T*>(v.const_data_ptr()) + b * points + first,
                        static_cast<const T*>(h.const_data_ptr()) + b * points + first});
  return problems;
}

// Calls f with the vector of problems.
template <class F>
void with_problems(const Tensor& cost, const std::optional<Tensor>& h, int64_t first, const F& f) {
  with_arithmetic(cost.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (h) f(factored<T>(cost, *h, first));
    else f(matrices<T>(cost, first));
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

// Whether rows [begin, end) hold neither NaN nor -inf where s < t.
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

template <class Check, class Job>
void in_parallel(const Job& job, int64_t rows) {
  if (rows * rows < kSerialElements) run<Check>(job, nullptr, 0, rows);
  else torch::stable::parallel_for(0, rows, 32, [&](int64_t a, int64_t b) { run<Check>(job, nullptr, a, b); });
}

template <class T>
int64_t inspect(const MatrixCost<T>& cost, int64_t nodes, bool certify) {
  std::atomic<bool> valid{true}, certified{true};
  in_parallel<CheckValues>(CostCheck<T>{cost, nodes, &valid}, nodes);
  if (certify && valid) in_parallel<CheckMonge>(CostCheck<T>{cost, nodes, &certified}, nodes);
  return (valid ? 0 : 1) + (certified ? 0 : 2);
}

template <class T>
int64_t inspect(const FactoredCost<T>& cost, int64_t nodes, bool certify) {
  if (nodes < 2) return 0;
  bool valid = true, increasing = true, certified = true;
  T low = cost.h[1], high = cost.h[1];  // h of the first node takes no part
  for (int64_t t = 1; t < nodes; ++t) {
    valid &= cost.v[0] + cost.h[t] > T(0) && cost.v[t] + cost.h[t] < kInfinity<T>;
    increasing &= cost.v[t - 1] <= cost.v[t];
    certified &= t == 1 || cost.h[t - 1] <= cost.h[t];
    low = std::min(low, cost.h[t]);
    high = std::max(high, cost.h[t]);
  }
  const bool in_range = cost.v[0] + low > (cost.v[nodes - 1] + high) / std::numeric_limits<T>::max() * T(0x1p64);
  return (valid ? 0 : 1) + (certified || !certify || !valid ? 0 : 2) + (increasing ? 0 : 4) + (in_range ? 0 : 8);
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

// Per problem the sum of what is wrong with the costs that take part:
//   1  one of them is NaN or -inf (of a factored cost: a v_s + h_t is not positive, or not finite)
//   2  where asked, and unless 1: the quadrangle inequality is not certified
//   4  v decreases somewhere
//   8  the products of a factored cost may leave the range of the arithmetic
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
