// The kernels of the row-wise skeleton: reduce a group of rows to a few sums, run the epilogue, map the rows.
//
//   on_chip              a team of threads takes a group: part of a warp, a block, or on sm_90 a cluster of blocks. The
//                        map finds the streams in (distributed) shared memory: each input is read once.
//   part_sums, finish    a group too large for a cluster, or too few of them to fill the device: many blocks sum parts,
//                        one block a group adds them up and runs the epilogue, and
//   map                  maps the rows with what that left in global memory; alone where a formula has no sums.
//
// Sums have a fixed tree for a given shape, alignment and device: elements of a vector, vectors of a thread, threads of
// a warp, warps of a block, blocks in order. No floating-point atomics: two runs agree to the bit. Nothing here waits
// for the device or reads from it, so a launch can be captured in a CUDA graph.
#pragma once

#include "../runtime/device.h"
#include "../runtime/team.cuh"
#include "../runtime/total.cuh"
#include "../runtime/vector.cuh"

namespace fastgen::cuda {

template <class T, class F, int N>
struct RowwiseArguments {
  F formula;
  Groups groups;
  int64_t size, vectors;  // of a row: elements, and vectors of kWidth<T>
  Stream in[N];
  Output out, second;

  __device__ __forceinline__ Span span(int64_t v) const { return span_of(v, vectors, size, kWidth<T>); }
};

template <class F>
constexpr bool kMaps = F::kMapStreams > 0;

// How a kernel reaches elements. Wide: 16 bytes at a time, where every row of every stream and of the output starts at
// 16 bytes and is a whole number of vectors. Else one at a time (Span). A template, for the registers that wide saves.
// Peeled, which only sweeps have: wide but for the elements before a row's first 16-byte boundary and after its last.
enum class Access { wide, single, peeled };

// Vectors that a thread loads before it uses the first: two of one stream, to keep loads in flight. More, or two of
// several streams, would cost registers and with them threads, whose loads are in flight too.
template <Access access, int kStreams>
constexpr int kBatch = access == Access::wide && kStreams == 1 ? 2 : 1;

template <class T, class F>
constexpr int kRowNumbers = sizeof(typename F::Row) / sizeof(T);

// How many registers a formula needs, from the vectors, the sums and the numbers of a row that a thread has at once:
// 0, 1 or 2. A second output is one more vector.
template <class T, class F>
constexpr int kDemand = F::kStreams + kMapsTwo<F> <= 3 && F::kStreams + F::kSums <= (sizeof(T) == 4 ? 5 : 4) &&
                                F::kStreams + kRowNumbers<T, F> <= 9
                            ? 0
                        : F::kStreams <= 6 ? 1
                                           : 2;

// Blocks of 256 threads that a multiprocessor holds at least: a bound on registers, 64 in float and 128 in double where
// formulas demand little, twice that and all of them where they would spill. From sm_100 on nvcc 13.0 takes more, and
// would spill within 64: there it has 80.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMostBlocks = 3;
#else
constexpr int kMostBlocks = 4;
#endif
template <class T, class F>
constexpr int kResident = kDemand<T, F> == 2   ? 1
                          : sizeof(T) == 8     ? 2 >> kDemand<T, F>
                          : kDemand<T, F> == 1 ? 2
                                               : kMostBlocks;

// Threads of a block that holds a group on chip at most, for the same reason. Epilogues in double need registers too.
template <class T, class F>
constexpr int kGroupThreads = kDemand<T, F> == 0 && (sizeof(T) == 4 || F::kStreams + F::kSums <= 3) ? kMaxThreads
                              : kDemand<T, F> == 1 && sizeof(T) == 4                               ? 512
                                                                                                   : 256;

// Vector v of streams kFirst … kLast - 1 of a row.
template <Access access, Use use, int kFirst, int kLast, class T, class F, int N, int M>
__device__ __forceinline__ void load(const RowwiseArguments<T, F, N>& job, int64_t row, int64_t v, Raw (&raw)[M]) {
#pragma unroll
  for (int s = kFirst; s < kLast; ++s) {
    const int64_t start = row * job.in[s].row_stride;
    if constexpr (access == Access::wide) load_wide<T, use, kMasks<F>>(job.in[s], start + v * kWidth<T>, raw[s]);
    else load_single<T, use, kMasks<F>>(job.in[s], start, job.span(v), raw[s]);
  }
}

// Adds a vector's share to the group's sums: elements first, then the vector, so that errors stay small.
template <Access access, class T, class F, int N>
__device__ __forceinline__ void accumulate(const RowwiseArguments<T, F, N>& job, const typename F::Row& constants,
                                           int64_t vector, const Raw (&raw)[N], T (&sums)[F::kSums]) {
  const int count = access == Access::wide ? kWidth<T> : job.span(vector).count;
  T x[N][kWidth<T>], add[F::kSums] = {};
#pragma unroll
  for (int s = 0; s < N; ++s) unpack<T, kMasks<F>>(raw[s], job.in[s].dtype, x[s]);
#pragma unroll
  for (int j = 0; j < kWidth<T>; ++j)
    if (j < count) {
      T v[N];
#pragma unroll
      for (int s = 0; s < N; ++s) v[s] = x[s][j];
      job.formula.accumulate(constants, v, add);
    }
#pragma unroll
  for (int k = 0; k < F::kSums; ++k) sums[k] += constants.scale * add[k];
}

template <Access access, class T, class F, int N>
__device__ __forceinline__ void store(const RowwiseArguments<T, F, N>& job, const Output& out, int64_t row,
                                      int64_t vector, const T (&y)[kWidth<T>]) {
  const Raw packed = pack<T>(y, out.dtype);
  if constexpr (access == Access::wide) store_wide<T>(out, row * job.size + vector * kWidth<T>, packed);
  else store_single<T>(out, row * job.size, job.span(vector), packed);
}

template <Access access, class T, class F, int N, int M>
__device__ __forceinline__ void map_vector(const RowwiseArguments<T, F, N>& job, int64_t row,
                                           const typename F::Row& constants, const Coefficient<F, T>& coefficient,
                                           int64_t vector, const Raw (&raw)[M]) {
  T x[F::kMapStreams][kWidth<T>], y[kWidth<T>], second[kWidth<T>];
#pragma unroll
  for (int s = 0; s < F::kMapStreams; ++s) unpack<T, kMasks<F>>(raw[s], job.in[s].dtype, x[s]);
#pragma unroll
  for (int j = 0; j < kWidth<T>; ++j) {
    T v[F::kMapStreams];
#pragma unroll
    for (int s = 0; s < F::kMapStreams; ++s) v[s] = x[s][j];
    y[j] = job.formula.map(constants, coefficient, v);
    if constexpr (kMapsTwo<F>) second[j] = job.formula.second(constants, v);
  }
  store<access>(job, job.out, row, vector, y);
  if constexpr (kMapsTwo<F>) store<access>(job, job.second, row, vector, second);
}

// A vector of a group, numbered row by row.
struct Place {
  int rank, vector;
  int64_t row;
};

template <class T, class F, int N>
__device__ __forceinline__ Place place(const RowwiseArguments<T, F, N>& job, int64_t group, int item) {
  const int vectors = static_cast<int>(job.vectors);  // below 2^30 (plan_groups)
  const int rank = job.groups.rows == 1 ? 0 : item / vectors;
  return {rank, item - rank * vectors, job.groups.row(group, rank)};
}

// One team's work on a group: items first + thread, first + thread + threads, … below last.
template <Access access, class T, class F, int N>
struct Team {
  const RowwiseArguments<T, F, N>& job;
  int64_t group;
  int first, last, threads, slots;
  char* held;
  bool maps;

  __device__ __forceinline__ Held<T, kMasks<F>> holder(int stream) const {
    const int block = blockDim.x * blockDim.y;
    char* base = held;
#pragma unroll
    for (int s = 0; s < F::kMapStreams; ++s)
      if (s < stream) base += slots * block * bytes_of<kMasks<F>>(job.in[s].dtype) * kWidth<T>;
    return {base, block, static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x)};
  }

  __device__ __forceinline__ void reduce(double (&totals)[F::kSums]) const {
    constexpr int batch = kBatch<access, N>;
    T sums[F::kSums] = {};
    typename F::Row constants;
    int rank = -1;
#pragma unroll 1
    for (int base = first + threadIdx.x, slot = 0; base < last; base += batch * threads, slot += batch) {
      Raw raw[batch][N];
#pragma unroll
      for (int b = 0; b < batch; ++b)
        if (base + b * threads < last) {
          const Place at = place(job, group, base + b * threads);
          load<access, Use::last, 0, N>(job, at.row, at.vector, raw[b]);
        }
#pragma unroll
      for (int b = 0; b < batch; ++b)
        if (base + b * threads < last) {
          const Place at = place(job, group, base + b * threads);
          if (at.rank != rank) constants = job.formula.row(at.row, rank = at.rank);
          if (kMaps<F> && maps)
#pragma unroll
            for (int s = 0; s < F::kMapStreams; ++s) holder(s).store(slot + b, job.in[s].dtype, raw[b][s]);
          accumulate<access>(job, constants, at.vector, raw[b], sums);
        }
    }
#pragma unroll
    for (int k = 0; k < F::kSums; ++k) totals[k] = static_cast<double>(sums[k]);
  }

  __device__ __forceinline__ void map(const Slope<F, T>& slope) const {
    typename F::Row constants;
    Coefficient<F, T> coefficient{};
    int rank = -1;
#pragma unroll 1
    for (int item = first + threadIdx.x, slot = 0; item < last; item += threads, ++slot) {
      const Place at = place(job, group, item);
      Raw raw[F::kMapStreams];
#pragma unroll
      for (int s = 0; s < F::kMapStreams; ++s) holder(s).load(slot, job.in[s].dtype, raw[s]);
      if (at.rank != rank) {
        constants = job.formula.row(at.row, rank = at.rank);
        coefficient = job.formula.coefficient(at.row, rank, constants, slope);
      }
      map_vector<access>(job, at.row, constants, coefficient, at.vector, raw);
    }
  }
};

// What the threads of a block tell each other.
template <class T, class F>
struct Shared {
  Exchange<double, F::kSums, kCount<Slope<F, T>>> exchange;
  int flags_set[CountsFlags<F> ? 32 : 1];  // that each warp has found
  bool is_last;                            // of all blocks that store terms
};

// By all threads of a block. A barrier has to come before run_epilogue().
template <class T, class F>
__device__ __forceinline__ void count_flags(const F& formula, Shared<T, F>& shared) {
  if constexpr (CountsFlags<F>) {
    F copy = formula;
    const FlagCounts<T>& counts = copy.flag_counts();
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    int set = 0;
    for (int i = thread; i < counts.uncounted; i += threads) set += counts.flags[i] != 0;
    set = warp_sum(set);
    if (thread % 32 == 0) shared.flags_set[thread / 32] = set;
  }
}

template <class T, class F>
__device__ __forceinline__ Slope<F, T> run_epilogue(const F& formula, int64_t group,
                                                    const double (&totals)[F::kSums], const Shared<T, F>& shared) {
  T sums[F::kSums];
#pragma unroll
  for (int k = 0; k < F::kSums; ++k) sums[k] = static_cast<T>(totals[k]);
  if constexpr (CountsFlags<F>) {
    F counted = formula;
    FlagCounts<T>& counts = counted.flag_counts();
    if (counts.uncounted > 0) {
      int set = 0;
      for (int warp = 0; warp < static_cast<int>(blockDim.x * blockDim.y / 32); ++warp) set += shared.flags_set[warp];
      counts.set = static_cast<T>(set);
      counts.unset = static_cast<T>(counts.uncounted - set);
    }
    return counted.epilogue(group, sums);
  } else {
    return formula.epilogue(group, sums);
  }
}

// Barriers, besides those of block_sum, Cluster and add_up_if_last: one before a block's threads read the slope, and one
// before a team within a warp reads how many flags all warps have found. No memory is reused between barriers, and a
// block serves one group (several teams share a block only within warps). That barrier also orders what the epilogue
// stored in global memory before row() reads it for the map: __syncwarp, __syncthreads, and the release and acquire of
// the cluster's barrier.
template <Access access, class T, class F, int N>
__global__ void __launch_bounds__(kGroupThreads<T, F>, 1)
    on_chip(const __grid_constant__ RowwiseArguments<T, F, N> job, const __grid_constant__ GroupPlan plan,
            const __grid_constant__ Total<T> total) {
  constexpr int kSlopes = kCount<Slope<F, T>>;
  extern __shared__ uint4 held[];
  __shared__ Shared<T, F> shared;
  auto& exchange = shared.exchange;
  int share = 0;
#if FASTGEN_CLUSTERS
  if (plan.cluster > 1) {
    Cluster::arrive();
    share = Cluster{}.rank();
  }
#endif
  const bool maps = kMaps<F> && job.out.data != nullptr;
  const int64_t group = int64_t{1} * (blockIdx.x / plan.cluster) * plan.teams + threadIdx.y;
  const bool present = group < job.groups.count;  // an absent team's threads still take part in their warp's sums
  const int64_t items = job.groups.rows * job.vectors, first = int64_t{1} * share * plan.share;
  const int64_t last = min(items, first + plan.share);
  const Team<access, T, F, N> team{job,
                                   group,
                                   static_cast<int>(first),
                                   present ? static_cast<int>(last) : 0,
                                   plan.threads,
                                   plan.slots,
                                   reinterpret_cast<char*>(held),
                                   maps};
  double totals[F::kSums];
  team.reduce(totals);
  count_flags<T>(job.formula, shared);

  Slope<F, T> slope{};
  if (plan.threads <= 32) {
#pragma unroll
    for (int k = 0; k < F::kSums; ++k) totals[k] = warp_sum(totals[k], plan.threads);
    if constexpr (CountsFlags<F>) __syncthreads();
    if (present && threadIdx.x == 0) slope = run_epilogue<T>(job.formula, group, totals, shared);
    __syncwarp();  // what the epilogue stored, row() may read on any lane
#pragma unroll
    for (int k = 0; k < kSlopes; ++k) nth(slope, k) = __shfl_sync(~0u, nth(slope, k), 0, plan.threads);
  } else {
    block_sum(totals, exchange.warp);
#if FASTGEN_CLUSTERS
    if (plan.cluster > 1) Cluster{}.sum(totals, exchange);
#endif
    if (threadIdx.x == 0 && share == 0) slope = run_epilogue<T>(job.formula, group, totals, shared);
    if (maps) {
      double slopes[kSlopes];
#pragma unroll
      for (int k = 0; k < kSlopes; ++k) slopes[k] = static_cast<double>(nth(slope, k));
#if FASTGEN_CLUSTERS
      if (plan.cluster > 1) Cluster{}.broadcast(slopes, exchange);
      else
#endif
      {
        if (threadIdx.x == 0)
          for (int k = 0; k < kSlopes; ++k) exchange.slope[k] = slopes[k];
        __syncthreads();
      }
#pragma unroll
      for (int k = 0; k < kSlopes; ++k) nth(slope, k) = static_cast<T>(exchange.slope[k]);
    }
  }
  if constexpr (kMaps<F>)
    if (maps) team.map(slope);
  if (total.by_last_block() && blockIdx.x % plan.cluster == 0)
    add_up_if_last(total, gridDim.x / plan.cluster, shared.is_last, exchange.warp[0]);
}

// Block i sums part i of all rows' parts of kPartVectors vectors, numbered group by group and row by row.
template <Access access, class T, class F, int N>
__global__ void __launch_bounds__(kPartThreads, kResident<T, F>)
    part_sums(const __grid_constant__ RowwiseArguments<T, F, N> job, double* parts) {
  __shared__ Exchange<double, F::kSums> exchange;
  const int64_t row_parts = ceil_div<int64_t>(job.vectors, kPartVectors), index = blockIdx.x / row_parts;
  const int rank = static_cast<int>(index % job.groups.rows);
  const int64_t row = job.groups.row(index / job.groups.rows, rank);
  const auto constants = job.formula.row(row, rank);
  const int64_t first = blockIdx.x % row_parts * kPartVectors, last = min(job.vectors, first + kPartVectors);
  const bool again = kMaps<F> && job.out.data != nullptr;
  T sums[F::kSums] = {};
#pragma unroll 1
  for (int64_t v = first + threadIdx.x; v < last; v += kPartThreads) {
    Raw raw[N];
    if (again) load<access, Use::again, 0, F::kMapStreams>(job, row, v, raw);
    else load<access, Use::last, 0, F::kMapStreams>(job, row, v, raw);
    load<access, Use::last, F::kMapStreams, N>(job, row, v, raw);
    accumulate<access>(job, constants, v, raw, sums);
  }
  double totals[F::kSums];
#pragma unroll
  for (int k = 0; k < F::kSums; ++k) totals[k] = static_cast<double>(sums[k]);
  block_sum(totals, exchange.warp);
  if (threadIdx.x == 0)
    for (int k = 0; k < F::kSums; ++k) parts[blockIdx.x * int64_t{F::kSums} + k] = totals[k];
}

// Block g adds up the parts of group g and runs its epilogue.
template <class T, class F>
__global__ void __launch_bounds__(kPartThreads) finish(const __grid_constant__ F formula, const double* parts,
                                                       int64_t group_parts, Slope<F, T>* slopes,
                                                       const __grid_constant__ Total<T> total) {
  __shared__ Shared<T, F> shared;
  const double* own = parts + blockIdx.x * group_parts * F::kSums;
  double totals[F::kSums] = {};
  for (int64_t p = threadIdx.x; p < group_parts; p += kPartThreads)
    for (int k = 0; k < F::kSums; ++k) totals[k] += own[p * F::kSums + k];
  count_flags<T>(formula, shared);
  block_sum(totals, shared.exchange.warp);
  if (threadIdx.x == 0) slopes[blockIdx.x] = run_epilogue<T>(formula, blockIdx.x, totals, shared);
  if (total.by_last_block()) add_up_if_last(total, gridDim.x, shared.is_last, shared.exchange.warp[0]);
}

// Teams map segments of rows; `slopes` [groups] is what the epilogues returned, null where there were none. Starts with
// the last segments: after part_sums those are still in the cache.
template <Access access, class T, class F, int N>
__global__ void __launch_bounds__(kMapThreads, kResident<T, F>)
    map(const __grid_constant__ RowwiseArguments<T, F, N> job, const Slope<F, T>* slopes, int64_t segments) {
  constexpr int batch = kBatch<access, F::kMapStreams>;
  if constexpr (MayBeIdle<F>)
    if (job.formula.idle()) return;
  const int64_t units = job.groups.count * job.groups.rows * segments;
  const int64_t step = int64_t{1} * gridDim.x * blockDim.y;
#pragma unroll 1
  for (int64_t unit = units - 1 - int64_t{1} * blockIdx.x * blockDim.y - threadIdx.y; unit >= 0; unit -= step) {
    const int64_t index = unit / segments, group = index / job.groups.rows, rank = index - group * job.groups.rows;
    const int64_t row = job.groups.row(group, rank);
    const int64_t first = (unit - index * segments) * batch * blockDim.x + threadIdx.x;
    Raw raw[batch][F::kMapStreams];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const int64_t v = first + b * blockDim.x;
      if (v < job.vectors) load<access, Use::last, 0, F::kMapStreams>(job, row, v, raw[b]);
    }
    const auto constants = job.formula.row(row, rank);
    const auto coefficient = job.formula.coefficient(row, rank, constants, slopes ? slopes[group] : Slope<F, T>{});
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const int64_t v = first + b * blockDim.x;
      if (v < job.vectors) map_vector<access>(job, row, constants, coefficient, v, raw[b]);
    }
  }
}

}  // namespace fastgen::cuda
