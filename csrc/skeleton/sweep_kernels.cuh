// The sweep skeleton on a GPU (formula.h says what its formulas are): a row is one block's, or on sm_90 a
// cluster's, whose blocks take equal shares.
//
// The first pass, which finds maximum and sum, leaves the row's logits in (distributed) shared memory as they came; the
// second, which sums what formulas want, leaves there what the map wants; so that only the first reads global memory,
// and the last is short. A row that does not fit is read again by each pass, and so are many rows that more than a few
// blocks would have to hold. A formula that neither normalizes nor sums has nothing to wait for: any number of blocks map
// shares of a row.
//
// Sums have a fixed tree for a given shape, alignment and device: elements of a vector, vectors of a thread, threads,
// blocks, the last two in float64. No atomics.
#pragma once

#include "../runtime/token_rows.h"
#include "exp.h"
#include "rowwise_kernels.cuh"

namespace fastgen::cuda {

constexpr int kSweepThreads = 256;  // of a block
// Blocks on a multiprocessor at least: 64 registers a thread of one stream, or of two whose dtype is known. Where a launch
// decides how they are read, 80 or, element by element, 128, which spill nothing.
template <class T, Access access, ScalarType alike, int N>
constexpr int kSweepBlocks = sizeof(T) == 8                                ? 1
                             : N == 1 || alike != ScalarType::Undefined ? 4
                             : access == Access::wide                   ? 3
                                                                        : 2;
constexpr int kMapSlots = 4;        // vectors of a thread where a row is only mapped

template <class F>
constexpr bool kMapsAtOnce = requires { requires F::kMapsAtOnce; };
template <class F>
constexpr bool kSumsOnly = requires { requires F::kSumsOnly; };
template <class T>
constexpr ScalarType kDtype = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

template <class F>
constexpr bool kGathers = F::kNormalizes || F::kSums > 0;  // blocks wait for each other

struct SweepPlan {
  int threads, parts, share;  // of a block; blocks of a row; vectors of a block
  int slots;                  // vectors of a thread kept in shared memory; 0: none
  int slot;                   // 16-byte pieces from one of them to the next
  int64_t shared_bytes;

  bool operator==(const SweepPlan&) const = default;
};

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
  struct Normals {
    Normal of[N];
  };
  struct Totals {
    double of[K];
  };
  T warp_max[N][32];
  double warp_normal_sums[N][32];
  double warp_sums[K][32];
  Normals normals[kMaxCluster];
  Totals totals[kMaxCluster];
  typename F::Row row;
};

// Where a thread keeps what it has of a vector: 16-byte pieces in shared memory that it alone writes and reads, a
// warp's being neighbours.
struct Slot {
  uint4* first;
  int threads;

  __device__ __forceinline__ void store(int piece, int bytes, const Raw& raw) const {
    first[piece * threads] = get(raw, 0);
    if (bytes > 16) first[(piece + 1) * threads] = get(raw, 4);
  }
  __device__ __forceinline__ void load(int piece, int bytes, Raw& raw) const {
    put(raw, 0, first[piece * threads]);
    if (bytes > 16) put(raw, 4, first[(piece + 1) * threads]);
  }
};

// One block's work on its share of a row: vectors first + thread, first + thread + threads, … below last.
// `alike`: the dtype of all streams and of the output, Undefined where only the launch knows them.
template <Access access, ScalarType alike, class T, class F, int N>
struct Sweep {
  const SweepArguments<T, F, N>& job;
  const SweepPlan& plan;
  SweepExchange<T, F>& exchange;
  uint4* memory;
  int64_t row;
  int first, last, part, head;
  const void* in[N];  // the row

  __device__ __forceinline__ Sweep(const SweepArguments<T, F, N>& job_, const SweepPlan& plan_,
                                   SweepExchange<T, F>& exchange_, uint4* memory_)
      : job(job_), plan(plan_), exchange(exchange_), memory(memory_), row(blockIdx.x / plan_.parts) {
    part = static_cast<int>(blockIdx.x - static_cast<unsigned>(row) * plan.parts);
    first = part * plan.share;
    last = static_cast<int>(min(job.vectors, static_cast<int64_t>(first) + plan.share));
    head = access == Access::peeled ? job.head(row) : 0;
#pragma unroll
    for (int s = 0; s < N; ++s)
      in[s] = static_cast<const char*>(job.in[s].data) + job.start(s, row) * bytes_of<false>(dtype(s));
  }

  __device__ __forceinline__ ScalarType dtype(int stream) const {
    return alike == ScalarType::Undefined ? job.in[stream].dtype : alike;
  }
  __device__ __forceinline__ Stream stream(int s) const { return {in[s], dtype(s), 0}; }
  __device__ __forceinline__ Output out() const {
    return {job.out.data, alike == ScalarType::Undefined ? job.out.dtype : alike};
  }

  __device__ __forceinline__ Span span(int64_t v) const {
    if constexpr (access == Access::peeled) return peeled_span_of(v, head, job.size, kWidth<T>);
    return span_of(v, job.vectors, job.size, kWidth<T>);
  }

  __device__ __forceinline__ int bytes(int stream) const { return bytes_of<false>(dtype(stream)) * kWidth<T>; }

  __device__ __forceinline__ Slot first_slot() const { return {memory + threadIdx.x, plan.threads}; }

  // The first piece of a stream in a slot.
  __device__ __forceinline__ int piece(int stream) const { return stream == 0 ? 0 : bytes(0) > 16 ? 2 : 1; }

  // Whether 16-byte accesses reach all of vector v, and from which column on.
  __device__ __forceinline__ bool whole(int64_t v) const {
    if constexpr (access == Access::peeled) return v > 0 && span(v).count == kWidth<T>;
    return access == Access::wide;
  }
  __device__ __forceinline__ int64_t begin(int64_t v) const {
    return access == Access::peeled ? head + (v - 1) * kWidth<T> : v * kWidth<T>;
  }

  template <Use use>
  __device__ __forceinline__ void load(int v, Raw (&raw)[N]) const {
    const bool wide = whole(v);
#pragma unroll
    for (int s = 0; s < N; ++s) {
      if (wide) load_wide<T, use, false>(stream(s), begin(v), raw[s]);
      else load_single<T, use, false>(stream(s), 0, span(v), raw[s]);
    }
  }

  __device__ __forceinline__ void again(int v, const Slot& at, Raw (&raw)[N]) const {
    if (plan.slots == 0) return load<Use::again>(v, raw);
#pragma unroll
    for (int s = 0; s < N; ++s) at.load(piece(s), bytes(s), raw[s]);
  }

  __device__ __forceinline__ int count(int64_t v) const {
    return access == Access::wide ? kWidth<T> : span(v).count;
  }

  __device__ __forceinline__ void store(int v, const T (&y)[kWidth<T>]) const {
    const Raw raw = pack<T>(y, out().dtype);
    if (whole(v)) store_wide<T>(out(), row * job.width + begin(v), raw);
    else store_single<T>(out(), row * job.width, span(v), raw);
  }

  // Zeros in the columns from `begin` to the output's width.
  __device__ __forceinline__ void zero(int64_t begin) const {
    Raw raw{};
    const Span one{0, 1, 1};
    for (int64_t i = begin + int64_t{1} * part * plan.threads + threadIdx.x; i < job.width;
         i += int64_t{1} * plan.parts * plan.threads)
      store_single<T>(out(), row * job.width + i, one, raw);
  }

  __device__ __forceinline__ void clear() const {
    const T zeros[kWidth<T>] = {};
    for (int v = first + threadIdx.x; v < last; v += plan.threads) store(v, zeros);
    zero(job.size);
  }

  // After it every block has what the first warp of every block has as `value` at `place` of its own exchange.
  template <class V>
  __device__ __forceinline__ void gather(V* place, const V& value, [[maybe_unused]] bool first_time) const {
#if FASTGEN_CLUSTERS
    if (plan.parts > 1) {
      const Cluster cluster;
      if (first_time) cluster.group.barrier_wait();  // joined: all blocks run
      if (threadIdx.x < plan.parts) *cluster.group.map_shared_rank(place, threadIdx.x) = value;  // a lane for each block
      __syncwarp();
      cluster.group.sync();
      return;
    }
#endif
    if (threadIdx.x == 0) *place = value;
    __syncthreads();
  }

  // On every thread, the largest of the block's of each stream.
  __device__ __forceinline__ void block_max(T (&x)[N]) const {
#pragma unroll
    for (int s = 0; s < N; ++s) {
      for (int offset = 16; offset > 0; offset /= 2) x[s] = at_least(__shfl_xor_sync(~0u, x[s], offset), x[s]);
      if (threadIdx.x % 32 == 0) exchange.warp_max[s][threadIdx.x / 32] = x[s];
    }
    __syncthreads();
    for (int w = 0; w < plan.threads / 32; ++w)
#pragma unroll
      for (int s = 0; s < N; ++s) x[s] = at_least(exchange.warp_max[s][w], x[s]);
  }

  // The online sum of base^(v scale), relative to the largest v.
  struct Powers {
    T most = -static_cast<T>(INFINITY), base = T(-1e37), sum = T(0);

    // The first n of each vector.
    template <int kVectors>
    __device__ __forceinline__ void add(const T (&x)[kVectors][kWidth<T>], int n, T scale) {
      T top = most, more = T(0);
#pragma unroll
      for (int i = 0; i < kVectors * kWidth<T>; ++i)
        if (i % kWidth<T> < n) top = at_least(x[i / kWidth<T>][i % kWidth<T>], top);
      const Origin<T> origin(top, scale);
#pragma unroll
      for (int i = 0; i < kVectors * kWidth<T>; ++i)
        if (i % kWidth<T> < n) more += Base::power(origin.from(x[i / kWidth<T>][i % kWidth<T>]));
      sum = sum * origin.carries(base, most == top) + more;
      most = top, base = origin.base;
    }
    __device__ __forceinline__ T total(T max, T scale) const {
      return sum * Origin<T>(max, scale).carries(base, most == max);
    }
  };

  __device__ __forceinline__ void normalize(Softmax<T> (&normal)[N]) const {
    const T scale = Base::scale(job.formula.inverse_temperature);
    Powers powers[N];
    Slot at = first_slot();
    const auto take = [&]<int kVectors>(int v, const Raw (&raw)[kVectors][N]) {
#pragma unroll
      for (int s = 0; s < N; ++s) {
        T x[kVectors][kWidth<T>];
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          if (plan.slots > 0) Slot{at.first + i * plan.slot, at.threads}.store(piece(s), bytes(s), raw[i][s]);
          unpack<T, false>(raw[i][s], dtype(s), x[i]);
        }
        powers[s].add(x, count(v), scale);
      }
      at.first += kVectors * plan.slot;
    };
    int v = first + threadIdx.x;
    if constexpr (access == Access::wide) {  // two vectors of each stream in flight, with one origin
#pragma unroll 1
      for (; v + plan.threads < last; v += 2 * plan.threads) {
        Raw raw[2][N];
        load<Use::again>(v, raw[0]);
        load<Use::again>(v + plan.threads, raw[1]);
        take(v, raw);
      }
    }
#pragma unroll 1
    for (; v < last; v += plan.threads) {
      Raw raw[1][N];
      load<Use::again>(v, raw[0]);
      take(v, raw);
    }
    double totals[N];
    T block[N];
#pragma unroll
    for (int s = 0; s < N; ++s) block[s] = powers[s].most;
    block_max(block);
#pragma unroll
    for (int s = 0; s < N; ++s) totals[s] = static_cast<double>(powers[s].total(block[s], scale));
    block_sum(totals, exchange.warp_normal_sums);
    typename SweepExchange<T, F>::Normals mine;
#pragma unroll
    for (int s = 0; s < N; ++s) mine.of[s] = {block[s], totals[s]};
    gather(&exchange.normals[part], mine, true);
    const int lane = threadIdx.x % kMaxCluster;  // one for each block, in each half of a warp
#pragma unroll
    for (int s = 0; s < N; ++s) {
      typename SweepExchange<T, F>::Normal of{-static_cast<T>(INFINITY), 0};
      if (lane < plan.parts) of = exchange.normals[lane].of[s];
      T max = of.max;
      for (int offset = kMaxCluster / 2; offset > 0; offset /= 2) max = at_least(__shfl_xor_sync(~0u, max, offset), max);
      const Origin<T> origin(max, scale);
      double total =
          warp_sum(of.sum * static_cast<double>(origin.carries(Origin<T>(of.max, scale).base, of.max == max)), kMaxCluster);
      if (max != -static_cast<T>(INFINITY)) {
        total *= static_cast<double>(origin.factor(max));
        if (total < 1) total = 1;  // it has a summand of 1
      }
      normal[s] = {max, static_cast<T>(total)};
    }
  }

  // The vector's outputs. Only one element of a row is picked: the others cost one comparison a vector.
  __device__ __forceinline__ void map(const typename F::Row& constants, [[maybe_unused]] const T (&x)[kWidth<T>],
                                      const T (&parts)[F::kParts][kWidth<T>], int v,
                                      [[maybe_unused]] int64_t picked) const {
    T y[kWidth<T>];
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) {
      T one[F::kParts];
#pragma unroll
      for (int k = 0; k < F::kParts; ++k) one[k] = parts[k][j];
      y[j] = job.formula.map(constants, one);
    }
    if constexpr (requires { job.formula.map_picked(constants, T(0)); }) {
      const Span of = access == Access::wide ? Span{begin(v), 1, kWidth<T>} : span(v);
      const int64_t behind = picked - of.start;
      if (behind >= 0 && behind < int64_t{1} * of.count * of.stride && behind % of.stride == 0) {
        const int at = static_cast<int>(behind / of.stride);
        T value = x[0];
#pragma unroll
        for (int j = 1; j < kWidth<T>; ++j) value = j == at ? x[j] : value;
        value = job.formula.map_picked(constants, value);
#pragma unroll
        for (int j = 0; j < kWidth<T>; ++j) y[j] = j == at ? value : y[j];
      }
    }
    store(v, y);
  }

  // Hands the elements of this block's share to the formula. Its sums are added to `sums`; its parts are kept in shared
  // memory, mapped, or dropped.
  template <bool kSum, bool kMap>
  __device__ __forceinline__ void elements(const typename F::Row& constants, T* sums, bool keep, int64_t picked) const {
    Slot at = first_slot();
#pragma unroll 1
    for (int v = first + threadIdx.x; v < last; v += plan.threads, at.first += plan.slot) {
      Raw raw[N];
      again(v, at, raw);
      T x[N][kWidth<T>], parts[F::kParts][kWidth<T>], add[F::kSums + 1] = {};
#pragma unroll
      for (int s = 0; s < N; ++s) unpack<T, false>(raw[s], dtype(s), x[s]);
#pragma unroll
      for (int j = 0; j < kWidth<T>; ++j)
        if (j < count(v)) {
          T one[N], part[F::kParts];
#pragma unroll
          for (int s = 0; s < N; ++s) one[s] = x[s][j];
          job.formula.element(constants, one, part, add);
#pragma unroll
          for (int k = 0; k < F::kParts; ++k) parts[k][j] = part[k];
        }
      if constexpr (kSum)
        for (int k = 0; k < F::kSums; ++k) sums[k] += add[k];
      if constexpr (kMap) map(constants, x[0], parts, v, picked);
      else if (keep)
#pragma unroll
        for (int k = 0; k < F::kParts; ++k) at.store(2 * k, 32, pack<T>(parts[k], kDtype<T>));
    }
  }

  // Maps what was kept.
  __device__ __forceinline__ void map_kept(const typename F::Row& constants) const {
    Slot at = first_slot();
#pragma unroll 1
    for (int v = first + threadIdx.x; v < last; v += plan.threads, at.first += plan.slot) {
      T parts[F::kParts][kWidth<T>];
#pragma unroll
      for (int k = 0; k < F::kParts; ++k) {
        Raw raw;
        at.load(2 * k, 32, raw);
        unpack<T, false>(raw, kDtype<T>, parts[k]);
      }
      map(constants, parts[0], parts, v, -1);
    }
  }

  __device__ __forceinline__ T element_at(int64_t column) const {
    Raw raw[1];
    load_single<T, Use::again, false>(stream(0), column, Span{0, 1, 1}, raw[0]);
    T x[kWidth<T>];
    unpack<T, false>(raw[0], dtype(0), x);
    return x[0];
  }

  // Adds up what the blocks have summed, completes the row and hands it to every thread.
  __device__ __forceinline__ void finish(const T (&sums)[F::kSums], typename F::Row& constants) const {
    double totals[F::kSums];
#pragma unroll
    for (int k = 0; k < F::kSums; ++k) totals[k] = static_cast<double>(sums[k]);
    block_sum(totals, exchange.warp_sums);
    typename SweepExchange<T, F>::Totals mine;
#pragma unroll
    for (int k = 0; k < F::kSums; ++k) mine.of[k] = totals[k];
    gather(&exchange.totals[part], mine, !F::kNormalizes);
    if (threadIdx.x < 32) {  // of every block: they store the same numbers
      T total[F::kSums];
#pragma unroll
      for (int k = 0; k < F::kSums; ++k)
        total[k] = static_cast<T>(warp_sum(threadIdx.x < plan.parts ? exchange.totals[threadIdx.x].of[k] : 0.0));
      if (threadIdx.x == 0) {
        job.formula.epilogue(row, constants, total);
        exchange.row = constants;
      }
    }
    __syncthreads();
    constants = exchange.row;
  }

  __device__ __forceinline__ void run() const {
    Softmax<T> normal[N] = {};
    if constexpr (F::kNormalizes) normalize(normal);
    typename F::Row constants = job.formula.row(row, normal);
    if constexpr (F::kSums > 0) {
      T sums[F::kSums] = {};
      if constexpr (kSumsOnly<F>) {
        elements<true, false>(constants, sums, false, -1);
        return finish(sums, constants);
      }
      if (kMapsAtOnce<F> && job.out.data) elements<true, true>(constants, sums, false, -1);
      else elements<true, false>(constants, sums, job.out.data && plan.slots > 0, -1);
      finish(sums, constants);
      if (!job.out.data) return;
      if constexpr (!kMapsAtOnce<F>) {
        if (plan.slots > 0) map_kept(constants);
        else elements<false, true>(constants, nullptr, false, -1);
      }
    } else if (kGathers<F>) {
      if (part == 0 && threadIdx.x == 0) {
        job.formula.epilogue(row, constants, nullptr);
        if constexpr (requires(const F& f) { f.pick(row, constants, T(0)); }) {
          const int64_t picked = job.formula.picked(row);
          if (picked >= 0 && picked < job.size) job.formula.pick(row, constants, element_at(picked));
        }
      }
    }
    if constexpr (F::kSums == 0 && F::kParts > 0) {
      int64_t picked = -1;
      if constexpr (requires(const F& f) { f.map_picked(constants, T(0)); }) picked = job.formula.picked(row);
      elements<false, true>(constants, nullptr, false, picked);
    }
    if constexpr (F::kParts > 0) zero(job.size);
  }
};

template <Access access, ScalarType alike, class T, class F, int N>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T, access, alike, N>)
    sweep_rows(const __grid_constant__ SweepArguments<T, F, N> job, const __grid_constant__ SweepPlan plan) {
  extern __shared__ uint4 held[];
  __shared__ SweepExchange<T, F> exchange;
  const Sweep<access, alike, T, F, N> sweep(job, plan, exchange, held);
  if (job.formula.ignored(sweep.row)) {  // all blocks of a cluster find so, before any barrier
    if (sweep.part == 0 && threadIdx.x == 0) job.formula.ignore(sweep.row);
    if (job.out.data) sweep.clear();
    return;
  }
#if FASTGEN_CLUSTERS
  if (kGathers<F> && plan.parts > 1) Cluster::arrive();
#endif
  sweep.run();
}

}  // namespace fastgen::cuda
