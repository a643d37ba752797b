// A GPU as device.h describes a device.
#pragma once

#include "../skeleton/paths.cuh"
#include "../skeleton/rowwise.cuh"
#include "../skeleton/scatter.cuh"
#include "../skeleton/sweep.cuh"

namespace fastgen {

namespace cuda {

constexpr int64_t kCountedInKernel = 4096;  // flags that every block counts itself: a few bytes a thread from the cache

// One block: there is one flag a group.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) count_vector(const uint8_t* flags, int64_t n, T* counts) {
  __shared__ Exchange<int64_t, 1> exchange;
  int64_t set[1] = {0};
  for (int64_t i = threadIdx.x; i < n; i += kMaxThreads) set[0] += flags[i] != 0;
  block_sum(set, exchange.warp);
  if (threadIdx.x == 0) {
    counts[0] = static_cast<T>(set[0]);
    counts[1] = static_cast<T>(n - set[0]);
  }
}

}  // namespace cuda

struct Cuda {
  // A warp.
  struct Team {
    static __device__ __forceinline__ int64_t first() { return threadIdx.x % 32; }
    static __device__ __forceinline__ int64_t step() { return 32; }
    static __device__ __forceinline__ double sum(double x) { return cuda::warp_sum(x); }
    static __device__ __forceinline__ double max(double x) { return cuda::warp_max(x); }
  };

  template <class T, class F, int N>
  static void rowwise(const F& formula, const Groups& groups, const Rows<N>& rows, Output out = {},
                      Output second = {}) {
    cuda::rowwise<T>(formula, groups, rows, out, second, cuda::Total<T>{});
  }

  template <class T, class F, int N>
  static Tensor rowwise_loss(const F& formula, const Groups& groups, const Rows<N>& rows, Output out,
                             const Tensor& terms, Reduction reduction) {
    if (reduction == Reduction::none) {
      rowwise<T>(formula, groups, rows, out);
      return terms;
    }
    const Tensor sum = new_scalar(terms, terms.scalar_type());
    cuda::rowwise<T>(formula, groups, rows, out, {}, cuda::total_of<T>(terms, sum));
    return sum;
  }

  template <int N>
  static Tensor new_output(const Rows<N>& rows, ScalarType dtype) {
    return empty_strided(rows.tensors[0], rows.tensors[0].sizes(), rows.out_strides, dtype);
  }

  static Tensor new_logits(const Tensor& logits) {
    return empty_strided(logits, logits.sizes(), contiguous_strides(logits.sizes()), logits.scalar_type());
  }

  template <class T, class F, int N>
  static void sweep(const F& formula, const TokenRows<N>& rows, Output out, int64_t width) {
    cuda::sweep<T>(formula, rows, out, width);
  }

  template <class T, class F>
  static void scatter(const F& formula, const Tensor& on, int64_t rows, const Output& out) {
    cuda::scatter<T>(formula, on, rows, out);
  }

  static void check_indices(const char*, const Tensor&, int64_t) {}  // looking at them would take a sync

  template <class Costs, class T>
  static Tensor solve_paths(const Costs& costs, const Tensor& like, int64_t nodes, int64_t edges, bool use_monge,
                            T* totals) {
    return cuda::solve_paths(costs, like, nodes, edges, use_monge, totals);
  }

  template <class Costs>
  static void find_paths(const Costs& costs, const Tensor& table, int64_t problems, int64_t nodes, int64_t edges,
                         bool use_monge, int64_t* steps) {
    cuda::find_paths(costs, table, problems, nodes, edges, use_monge, steps);
  }

  template <class Costs>
  static void inspect_costs(const Costs& costs, const Tensor& like, int64_t problems, int64_t nodes, bool certify,
                            int64_t* status) {
    cuda::inspect_costs(costs, like, problems, nodes, certify, status);
  }

  template <class T>
  static Tensor sum(const Tensor& terms) {
    const Tensor out = new_scalar(terms, terms.scalar_type());
    cuda::launch_sum(cuda::Launch{terms}, cuda::total_of<T>(terms, out));
    return out;
  }

  // Counted on the device: the formula that divides by them runs there too, in this launch or a later one.
  template <class T>
  struct Flags {
    FlagCounts<T> counts;
    std::optional<Tensor> memory;

    Flags(const Tensor& flags, bool counted) : counts{flag_bytes(flags)} {
      if (!counted) return;
      if (flags.numel() <= cuda::kCountedInKernel) {
        counts.uncounted = flags.numel();
        return;
      }
      memory = new_vector(flags, 2, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
      counts.counted = mutable_data<const T>(*memory);
      cuda::Launch{flags}(&cuda::count_vector<T>, 1, dim3(cuda::kMaxThreads), 0, 1, counts.flags, flags.numel(),
                          mutable_data<T>(*memory));
    }
  };
};

}  // namespace fastgen
