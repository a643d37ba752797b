// The CPU as device.h describes a device.
#pragma once

#include "../skeleton/paths.h"
#include "../skeleton/rowwise.h"
#include "../skeleton/scatter.h"
#include "../skeleton/sweep.h"
#include "device.h"
#include "pooled.h"

namespace fastgen {

struct Cpu {
  // One thread.
  struct Team {
    static int64_t first() { return 0; }
    static int64_t step() { return 1; }
    static double sum(double x) { return x; }
    static double max(double x) { return x; }
  };

  template <class T, class F, int N>
  static void rowwise(const F& formula, const Groups& groups, const Rows<N>& rows, Output out = {},
                      Output second = {}) {
    if constexpr (MayBeIdle<F>)
      if (formula.idle()) return;
    cpu::rowwise<T>(formula, groups, rows, out, second);
  }

  template <int N>
  static Tensor new_output(const Rows<N>& rows, ScalarType dtype) {
    return cpu::pooled(rows.tensors[0], rows.tensors[0].sizes(), rows.out_strides, dtype);
  }

  static Tensor new_logits(const Tensor& logits) {
    return cpu::pooled(logits, logits.sizes(), contiguous_strides(logits.sizes()), logits.scalar_type());
  }

  template <class T, class F, int N>
  static void sweep(const F& formula, const TokenRows<N>& rows, Output out, int64_t width) {
    cpu::sweep<T>(formula, rows, out, width);
  }

  template <class T, class F>
  static void scatter(const F& formula, const Tensor&, int64_t rows, const Output& out) {
    cpu::scatter<T>(formula, rows, out);
  }

  static void check_indices(const char* name, const Tensor& contiguous, int64_t size) {
    const int64_t* data = static_cast<const int64_t*>(contiguous.const_data_ptr());
    int64_t largest = -1;
    for (int64_t i = 0; i < contiguous.numel(); ++i) largest = data[i] > largest ? data[i] : largest;
    STD_TORCH_CHECK(largest < size, name, " must be less than ", size, ", the size of the vocabulary; got ", largest);
  }

  template <class Costs, class T>
  static Tensor solve_paths(const Costs& costs, const Tensor& like, int64_t nodes, int64_t edges, bool use_monge,
                            T* totals) {
    return cpu::solve_paths(costs, like, nodes, edges, use_monge, totals);
  }

  template <class Costs>
  static void find_paths(const Costs& costs, const Tensor& table, int64_t problems, int64_t nodes, int64_t edges,
                         bool use_monge, int64_t* steps) {
    cpu::find_paths(costs, table, problems, nodes, edges, use_monge, steps);
  }

  template <class Costs>
  static void inspect_costs(const Costs& costs, const Tensor& like, int64_t problems, int64_t nodes, bool certify,
                            int64_t* status) {
    cpu::inspect_costs(costs, like, problems, nodes, certify, status);
  }

  template <class T>
  static Tensor sum(const Tensor& terms) {
    const T* data = static_cast<const T*>(terms.const_data_ptr());
    double total = 0;
    for (int64_t i = 0; i < terms.numel(); ++i) total += static_cast<double>(data[i]);
    const Tensor out = new_scalar(terms, terms.scalar_type());
    *mutable_data<T>(out) = static_cast<T>(total);
    return out;
  }

  template <class T, class F, int N>
  static Tensor rowwise_loss(const F& formula, const Groups& groups, const Rows<N>& rows, Output out,
                             const Tensor& terms, Reduction reduction) {
    rowwise<T>(formula, groups, rows, out);
    return reduction == Reduction::none ? terms : sum<T>(terms);
  }

  template <class T>
  struct Flags {
    FlagCounts<T> counts;

    Flags(const Tensor& flags, bool counted) : counts{flag_bytes(flags)} {
      if (!counted) return;
      int64_t set = 0;
      for (int64_t i = 0; i < flags.numel(); ++i) set += counts.flags[i] != 0;
      counts.set = static_cast<T>(set);
      counts.unset = static_cast<T>(flags.numel() - set);
    }
  };
};

}  // namespace fastgen
