// The sweep skeleton on a GPU (formula.h says what its formulas are): a row is one block's, or on sm_90 a
// cluster's, whose blocks take equal shares.
//
// The first pass, which finds maximum and sum, leaves the row's logits in (distributed) shared memory as they came, so
// that the passes after it read no global memory: two rows of 128 256 bfloat16 logits are 64 KB in each of eight blocks.
// A row that does not fit is read again by each pass. A formula that neither normalizes nor sums has nothing to wait
// for: any number of blocks map shares of a row.
//
// Sums have a fixed tree for a given shape, alignment and device: elements of a vector, vectors of a thread, threads,
// blocks in the order of their ranks, the last two in float64. No atomics.
#pragma once

#include "../runtime/token_rows.h"
#include "exp.h"
#include "rowwise.cuh"

namespace fastgen::cuda {

template <class T>
constexpr int kSweepThreads = sizeof(T) == 4 ? 512 : 256;  // of a block: 128 registers each, or all there are
constexpr int kMapSlots = 4;                               // vectors of a thread where a row is only mapped

template <class F>
constexpr bool kGathers = F::kNormalizes || F::kSums > 0;  // blocks wait for each other

struct SweepPlan {
  int threads, parts, share;  // of a block; blocks of a row; vectors of a block
  int slots;                  // vectors of a thread kept in shared memory; 0: none
  int64_t shared_bytes;

  bool operator==(const SweepPlan&) const = default;
};

// `held_bytes`: of one vector of all streams, where later passes want it.
inline SweepPlan plan_sweep(int64_t rows, int64_t vectors, int held_bytes, bool gathers, const Limits& limits) {
  SweepPlan plan{};
  if (!gathers) {
    plan.threads = team_threads(std::max<int64_t>(vectors, 33), std::min(limits.threads, kMapThreads));
    plan.share = kMapSlots * plan.threads;
    plan.parts = static_cast<int>(std::max<int64_t>(ceil_div<int64_t>(vectors, plan.share), 1));
    return plan;
  }
  const int64_t comfortable = limits.shared_bytes / 2 - 2048;  // two blocks on a multiprocessor: one reads, one writes
  for (plan.parts = 1;; plan.parts *= 2) {
    plan.share = static_cast<int>(ceil_div<int64_t>(vectors, plan.parts));
    plan.threads = team_threads(std::max(plan.share, 33), limits.threads);
    plan.slots = held_bytes ? ceil_div(plan.share, plan.threads) : 0;
    plan.shared_bytes = int64_t{1} * held_bytes * plan.slots * plan.threads;
    const bool idle_device = rows * plan.parts < 2 * limits.multiprocessors;
    if (plan.parts * 2 > limits.cluster || plan.share <= 512 || !(plan.shared_bytes > comfortable || idle_device)) break;
  }
  if (plan.shared_bytes > limits.shared_bytes) plan.slots = 0, plan.shared_bytes = 0;
  return plan;
}

template <class T, class F, int N>
struct SweepArguments {
  F formula;
  int64_t size, width, vectors;  // columns that are read, columns of the output, vectors of a row
  TokenStream in[N];
  Output out;

  __device__ __forceinline__ int64_t start(int s, int64_t row) const {
    return row / in[s].inner * in[s].outer_stride + row % in[s].inner * in[s].inner_stride;
  }
  // Of a peeled row: the elements before the first vector, alike in all streams and the output.
  __device__ __forceinline__ int head(int64_t row) const {
    const auto element = reinterpret_cast<uintptr_t>(in[0].data) / sizeof(uint16_t) / (bytes_of<false>(in[0].dtype) / 2);
    return static_cast<int>(-(element + static_cast<uintptr_t>(start(0, row))) % kWidth<T>);
  }
};

// What threads of a block, and blocks of a cluster, tell each other: each part has its own place and uses it once.
template <class T, class F>
struct SweepExchange {
  static constexpr int N = F::kStreams, K = F::kSums > 0 ? F::kSums : 1;
  struct Normal {
    T max;
    double sum;
  };
  T warp_max[N][32];
  Exchange<double, N> normal_sums;
  Exchange<double, K> sums;
  Normal normal[kMaxCluster][N];
  double totals[kMaxCluster][K];
  typename F::Row row;
};

// One block's work on its share of a row: vectors first + thread, first + thread + threads, … below last.
template <Access access, class T, class F, int N>
struct Sweep {
  const SweepArguments<T, F, N>& job;
  const SweepPlan& plan;
  SweepExchange<T, F>& exchange;
  char* memory;
  int64_t row, first, last;
  int part;
  int head;

  __device__ __forceinline__ Span span(int64_t v) const {
    if constexpr (access == Access::peeled) return peeled_span_of(v, head, job.size, kWidth<T>);
    return span_of(v, job.vectors, job.size, kWidth<T>);
  }

  __device__ __forceinline__ int64_t start(int s) const { return job.start(s, row); }

  __device__ __forceinline__ Held<T, false> holder(int stream) const {
    char* base = memory;
#pragma unroll
    for (int s = 0; s < N; ++s)
      if (s < stream) base += plan.slots * plan.threads * bytes_of<false>(job.in[s].dtype) * kWidth<T>;
    return {base, plan.threads, static_cast<int>(threadIdx.x)};
  }

  // Whether 16-byte accesses reach all of vector v, and from which column on.
  __device__ __forceinline__ bool whole(int64_t v) const {
    if constexpr (access == Access::peeled) return v > 0 && span(v).count == kWidth<T>;
    return access == Access::wide;
  }
  __device__ __forceinline__ int64_t begin(int64_t v) const {
    return access == Access::peeled ? head + (v - 1) * kWidth<T> : v * kWidth<T>;
  }

  template <Use use>
  __device__ __forceinline__ void load(int64_t v, Raw (&raw)[N]) const {
    const bool wide = whole(v);
#pragma unroll
    for (int s = 0; s < N; ++s) {
      const Stream in{job.in[s].data, job.in[s].dtype, 0};
      if (wide) load_wide<T, use, false>(in, start(s) + begin(v), raw[s]);
      else load_single<T, use, false>(in, start(s), span(v), raw[s]);
    }
  }

  __device__ __forceinline__ void again(int64_t v, int slot, Raw (&raw)[N]) const {
    if (plan.slots == 0) return load<Use::again>(v, raw);
#pragma unroll
    for (int s = 0; s < N; ++s) holder(s).load(slot, job.in[s].dtype, raw[s]);
  }

  __device__ __forceinline__ int count(int64_t v) const {
    return access == Access::wide ? kWidth<T> : span(v).count;
  }

  __device__ __forceinline__ int64_t column(int64_t v, int j) const {
    if constexpr (access == Access::wide) return v * kWidth<T> + j;
    const Span of = span(v);
    return of.start + int64_t{1} * j * of.stride;
  }

  __device__ __forceinline__ void store(int64_t v, const Raw& raw) const {
    if (whole(v)) store_wide<T>(job.out, row * job.width + begin(v), raw);
    else store_single<T>(job.out, row * job.width, span(v), raw);
  }

  // Zeros in the columns from `begin` to the output's width.
  __device__ __forceinline__ void zero(int64_t begin) const {
    Raw raw{};
    const Span one{0, 1, 1};
    for (int64_t i = begin + int64_t{1} * part * plan.threads + threadIdx.x; i < job.width;
         i += int64_t{1} * plan.parts * plan.threads)
      store_single<T>(job.out, row * job.width + i, one, raw);
  }

  __device__ __forceinline__ void clear() const {
    const Raw raw{};
    for (int64_t v = first + threadIdx.x; v < last; v += plan.threads) store(v, raw);
    zero(job.size);
  }

  // After it every block has what thread 0 of every block has put at `place` of its own exchange.
  template <class V>
  __device__ __forceinline__ void gather(V* place, const V& value, [[maybe_unused]] bool first_time) const {
#if FASTGEN_CLUSTERS
    if (plan.parts > 1) {
      const Cluster cluster;
      if (first_time) cluster.group.barrier_wait();  // joined: all blocks run
      if (threadIdx.x == 0)
        for (int b = 0; b < plan.parts; ++b) *cluster.group.map_shared_rank(place, b) = value;
      __syncwarp();
      cluster.group.sync();
      return;
    }
#endif
    if (threadIdx.x == 0) *place = value;
    __syncthreads();
  }

  // On every thread, the largest of the block's.
  __device__ __forceinline__ T block_max(T x, T* warps) const {
    for (int offset = 16; offset > 0; offset /= 2) {
      const T other = __shfl_xor_sync(~0u, x, offset);
      x = other > x ? other : x;
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 0; w < plan.threads / 32; ++w) x = warps[w] > x ? warps[w] : x;
    return x;
  }

  __device__ __forceinline__ void normalize(Softmax<T> (&normal)[N]) const {
    const T inverse = job.formula.inverse_temperature;
    T most[N], sum[N];
#pragma unroll
    for (int s = 0; s < N; ++s) most[s] = -static_cast<T>(INFINITY), sum[s] = T(0);
#pragma unroll 1
    for (int64_t v = first + threadIdx.x, slot = 0; v < last; v += plan.threads, ++slot) {
      Raw raw[N];
      load<Use::again>(v, raw);
#pragma unroll
      for (int s = 0; s < N; ++s) {
        if (plan.slots > 0) holder(s).store(static_cast<int>(slot), job.in[s].dtype, raw[s]);
        T x[kWidth<T>];
        unpack<T, false>(raw[s], job.in[s].dtype, x);
        T top = most[s], add = T(0);
#pragma unroll
        for (int j = 0; j < kWidth<T>; ++j)
          if (j < count(v)) top = x[j] > top ? x[j] : top;
        const T base = base_of(top);
#pragma unroll
        for (int j = 0; j < kWidth<T>; ++j)
          if (j < count(v)) add += exp_of((x[j] - base) * inverse);
        if (top > most[s]) sum[s] *= exp_of((most[s] - base) * inverse), most[s] = top;  // exp_of(-inf) is 0
        sum[s] += add;
      }
    }
    double totals[N];
    T block[N];
#pragma unroll
    for (int s = 0; s < N; ++s) {
      block[s] = block_max(most[s], exchange.warp_max[s]);
      totals[s] = static_cast<double>(sum[s] * exp_of((most[s] - base_of(block[s])) * inverse));
    }
    block_sum(totals, exchange.normal_sums);
#pragma unroll
    for (int s = 0; s < N; ++s)
      gather(&exchange.normal[part][s], typename SweepExchange<T, F>::Normal{block[s], totals[s]}, s == 0);
#pragma unroll
    for (int s = 0; s < N; ++s) {
      T max = exchange.normal[0][s].max;
      for (int b = 1; b < plan.parts; ++b) max = exchange.normal[b][s].max > max ? exchange.normal[b][s].max : max;
      double total = 0;
      for (int b = 0; b < plan.parts; ++b)
        total += exchange.normal[b][s].sum *
                 static_cast<double>(exp_of((exchange.normal[b][s].max - base_of(max)) * inverse));
      normal[s] = {max, static_cast<T>(total)};
    }
  }

  // Runs `use(parts, v, j)` on the elements of this block's share, adding to `sums`.
  template <class Finish>
  __device__ __forceinline__ void elements(const typename F::Row& constants, T* sums, const Finish& finish) const {
#pragma unroll 1
    for (int64_t v = first + threadIdx.x, slot = 0; v < last; v += plan.threads, ++slot) {
      Raw raw[N];
      again(v, static_cast<int>(slot), raw);
      T x[N][kWidth<T>], y[kWidth<T>];
#pragma unroll
      for (int s = 0; s < N; ++s) unpack<T, false>(raw[s], job.in[s].dtype, x[s]);
      T add[F::kSums + 1] = {};
#pragma unroll
      for (int j = 0; j < kWidth<T>; ++j)
        if (j < count(v)) {
          T one[N], parts[F::kParts];
#pragma unroll
          for (int s = 0; s < N; ++s) one[s] = x[s][j];
          job.formula.element(constants, one, parts, add);
          y[j] = finish(parts, one[0], v, j);
        }
      for (int k = 0; k < F::kSums; ++k) sums[k] += add[k];
      if constexpr (Finish::kWrites) store(v, pack<T>(y, job.out.dtype));
    }
  }

  struct Drop {
    static constexpr bool kWrites = false;
    __device__ __forceinline__ T operator()(const T*, T, int64_t, int) const { return T(0); }
  };

  struct Map {
    static constexpr bool kWrites = true;
    const Sweep& sweep;
    const typename F::Row& constants;
    int64_t picked;

    __device__ __forceinline__ T operator()(const T* parts, T v, int64_t vector, int j) const {
      if constexpr (requires(const F& f) { f.map_picked(constants, v); })
        if (sweep.column(vector, j) == picked) return sweep.job.formula.map_picked(constants, v);
      return sweep.job.formula.map(constants, parts);
    }
  };

  __device__ __forceinline__ void write(const typename F::Row& constants) const {
    int64_t picked = -1;
    if constexpr (requires(const F& f) { f.map_picked(constants, T(0)); }) picked = job.formula.picked(row);
    T unused[F::kSums + 1] = {};
    elements(constants, unused, Map{*this, constants, picked});
    zero(job.size);
  }

  __device__ __forceinline__ T element_at(int64_t column) const {
    Raw raw[1];
    load_single<T, Use::again, false>(Stream{job.in[0].data, job.in[0].dtype, 0}, start(0) + column, Span{0, 1, 1}, raw[0]);
    T x[kWidth<T>];
    unpack<T, false>(raw[0], job.in[0].dtype, x);
    return x[0];
  }

  __device__ __forceinline__ void run() const {
    Softmax<T> normal[N] = {};
    if constexpr (F::kNormalizes) normalize(normal);
    typename F::Row constants = job.formula.row(row, normal);
    if constexpr (F::kSums > 0) {
      T sums[F::kSums] = {};
      elements(constants, sums, Drop{});
      double totals[F::kSums];
#pragma unroll
      for (int k = 0; k < F::kSums; ++k) totals[k] = static_cast<double>(sums[k]);
      block_sum(totals, exchange.sums);
#pragma unroll
      for (int k = 0; k < F::kSums; ++k) gather(&exchange.totals[part][k], totals[k], false);
      if (threadIdx.x == 0) {  // of every block: they store the same numbers
        T total[F::kSums];
        for (int k = 0; k < F::kSums; ++k) {
          double sum = 0;
          for (int b = 0; b < plan.parts; ++b) sum += exchange.totals[b][k];
          total[k] = static_cast<T>(sum);
        }
        job.formula.epilogue(row, constants, total);
        exchange.row = constants;
      }
      if (!job.out.data) return;
      __syncthreads();
      constants = exchange.row;
    } else if (kGathers<F> && part == 0 && threadIdx.x == 0) {
      job.formula.epilogue(row, constants, nullptr);
      if constexpr (requires(const F& f) { f.pick(row, constants, T(0)); }) {
        const int64_t picked = job.formula.picked(row);
        if (picked >= 0 && picked < job.size) job.formula.pick(row, constants, element_at(picked));
      }
    }
    if constexpr (F::kParts > 0) write(constants);
  }
};

template <Access access, class T, class F, int N>
__global__ void __launch_bounds__(kSweepThreads<T>, 1) sweep_rows(const __grid_constant__ SweepArguments<T, F, N> job,
                                                                  const __grid_constant__ SweepPlan plan) {
  extern __shared__ uint4 held[];
  __shared__ SweepExchange<T, F> exchange;
  const int64_t row = blockIdx.x / plan.parts, first = int64_t{1} * (blockIdx.x % plan.parts) * plan.share;
  const Sweep<access, T, F, N> sweep{job,
                                     plan,
                                     exchange,
                                     reinterpret_cast<char*>(held),
                                     row,
                                     first,
                                     min(job.vectors, first + plan.share),
                                     static_cast<int>(blockIdx.x % plan.parts),
                                     access == Access::peeled ? job.head(row) : 0};
  if (job.formula.ignored(row)) {  // all blocks of a cluster find so, before any barrier
    if (sweep.part == 0 && threadIdx.x == 0) job.formula.ignore(row);
    if (job.out.data) sweep.clear();
    return;
  }
#if FASTGEN_CLUSTERS
  if (kGathers<F> && plan.parts > 1) Cluster::arrive();
#endif
  sweep.run();
}

template <class T, class F, int N>
bool is_wide(const SweepArguments<T, F, N>& job, int64_t rows) {
  bool wide = job.size % kWidth<T> == 0;
  for (const TokenStream& s : job.in) {
    const int bytes = bytes_of<false>(s.dtype);
    wide &= is_aligned(s.data, 2, s.inner_stride, bytes, kWidth<T>);
    wide &= is_aligned(s.data, 2, s.outer_stride, bytes, kWidth<T>);
  }
  return wide && (!job.out.data || is_aligned(job.out.data, rows, job.width, bytes_of<false>(job.out.dtype), kWidth<T>));
}

// Whether a row's elements of all streams and of the output lie alike to 16-byte boundaries, though rows may differ
// in it: odd vocabularies, in tensors without gaps.
template <class T, class F, int N>
bool is_peelable(const SweepArguments<T, F, N>& job, int64_t rows) {
  const auto phase = [](const void* data, ScalarType dtype) {
    return reinterpret_cast<uintptr_t>(data) / bytes_of<false>(dtype) % kWidth<T>;
  };
  const auto alike = [&](const void* data, ScalarType dtype, int64_t stride) {
    return phase(data, dtype) == phase(job.in[0].data, job.in[0].dtype) &&
           (rows <= 1 || (stride - job.in[0].inner_stride) % kWidth<T> == 0);
  };
  bool peelable = !job.out.data || alike(job.out.data, job.out.dtype, job.width);
  for (const TokenStream& s : job.in)
    peelable &= alike(s.data, s.dtype, s.inner_stride) &&
                (rows <= s.inner || (s.outer_stride - s.inner * s.inner_stride) % kWidth<T> == 0);
  return peelable;
}

// Runs `formula` over rows of logits, writing to `out`, [..., width], if it has data.
template <class T, class F, int N>
void sweep(const F& formula, const TokenRows<N>& rows, const Output& out, int64_t width) {
  static_assert(F::kStreams == N);
  if (rows.count == 0) return;
  const Launch launch(rows.tensors[0]);
  SweepArguments<T, F, N> job{formula, rows.size, width, ceil_div<int64_t>(rows.size, kWidth<T>), {}, out};
  std::copy(rows.stream.begin(), rows.stream.end(), job.in);
  int held_bytes = 0;
  if (F::kSums > 0)
    for (const TokenStream& s : job.in) held_bytes += bytes_of<false>(s.dtype) * kWidth<T>;
  const auto run = [&](auto access) {
    if (access() == Access::peeled) ++job.vectors;
    const auto kernel = &sweep_rows<access(), T, F, N>;
    const Limits limits = limits_of<&sweep_rows<access(), T, F, N>, kSweepThreads<T>>(launch.device);
    const SweepPlan plan = plan_sweep(rows.count, job.vectors, held_bytes, kGathers<F>, limits);
    launch(kernel, rows.count * plan.parts, dim3(plan.threads), plan.shared_bytes, kGathers<F> ? plan.parts : 1, job,
           plan);
  };
  if (is_wide(job, rows.count)) return run(std::integral_constant<Access, Access::wide>{});
  if constexpr (sizeof(T) == 4)  // float64 is for checks
    if (is_peelable(job, rows.count)) return run(std::integral_constant<Access, Access::peeled>{});
  run(std::integral_constant<Access, Access::single>{});
}

}  // namespace fastgen::cuda
