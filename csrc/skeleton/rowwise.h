// The row-wise skeleton on a CPU: reduce a row to a few sums, run the epilogue, map the row while it is in cache.
//
// Sums have one fixed tree whatever the number of threads: kLanes interleaved partial sums in a chunk, chunks added
// in float64 in order within a segment, segments in order within a row, rows in order within a group.
#pragma once

#include <algorithm>

#include "../runtime/convert.h"
#include "../runtime/isa.h"
#include "../runtime/rows.h"
#include "formula.h"

namespace fastgen::cpu {

constexpr int kLanes = 64;
constexpr int64_t kSegment = 16 * kChunk;   // what a thread takes when it shares a row with others
constexpr int64_t kSerialElements = 32768;   // less work than this is not worth waking threads for
constexpr int64_t kStreamingBytes = 8 << 20;  // outputs above this bypass the cache

// Whether a row is mapped in the pass that sums it up.
template <class F>
constexpr bool kMapsAtOnce = requires { requires F::kMapsAtOnce; };

template <class F, class T, int N>
struct RowwiseJob {
  // float64 is for oracles and gradient checks: not worth a third of the time that it takes to build all this.
  static constexpr bool kBaselineOnly = std::is_same_v<T, double>;
  static constexpr bool kBrain = std::is_same_v<T, float> && !kMasks<F>;
  F formula;
  Groups groups;
  int64_t size;
  std::array<Stream, N> in;
  Output out, second;
  bool streaming;
  bool brain;  // all streams are bfloat16, which takes no buffer to convert

  int64_t segments() const { return (size + kSegment - 1) / kSegment; }
  int64_t end_of(int64_t segment) const { return std::min(size, (segment + 1) * kSegment); }
};

// Adds element i of the streams to the partial sums of lane l. In: what gives a stream's elements as T.
template <class F, class T, class In>
FASTGEN_HD void accumulate_element(const F& formula, const typename F::Row& row, const In* in, int64_t i, int l,
                                   T (*lanes)[kLanes]) {
  T v[F::kStreams], sums[F::kSums];
  for (int s = 0; s < F::kStreams; ++s) v[s] = in[s][i];
  for (int k = 0; k < F::kSums; ++k) sums[k] = lanes[k][l];
  formula.accumulate(row, v, sums);
  for (int k = 0; k < F::kSums; ++k) lanes[k][l] = sums[k];
}

// Calls also(i) for each element i, while it is in registers.
template <class F, class T, class In, class Also>
FASTGEN_HD void accumulate_chunk(const F& formula, const typename F::Row& row, const In* in, int64_t n, double* sums,
                                 const Also& also) {
  T lanes[F::kSums][kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int s = 0; s < F::kStreams; ++s) prefetch<kLanes>(in[s], i + kChunk);
    for (int l = 0; l < kLanes; ++l) accumulate_element(formula, row, in, i + l, l, lanes), also(i + l);
  }
  for (int l = 0; i + l < n; ++l) accumulate_element(formula, row, in, i + l, l, lanes), also(i + l);
  for (int k = 0; k < F::kSums; ++k) {
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int l = 0; l < width; ++l) lanes[k][l] += lanes[k][l + width];
    sums[k] += static_cast<double>(lanes[k][0]);
  }
}

// Calls use(in) with n elements from i on of a row's first kCount streams, in[s][j] being element j of stream s.
template <int kCount, class F, class T, int N, class Use>
FASTGEN_HD void with_chunk(const RowwiseJob<F, T, N>& job, int64_t row, int64_t i, int64_t n, T (*buffers)[kChunk],
                           const Use& use) {
  if constexpr (RowwiseJob<F, T, N>::kBrain)
    if (job.brain) {
      Brain in[kCount];
      for (int s = 0; s < kCount; ++s)
        in[s] = {static_cast<const uint16_t*>(job.in[s].data) + row * job.in[s].row_stride + i};
      return use(in);
    }
  const T* in[kCount];
  for (int s = 0; s < kCount; ++s)
    in[s] = load(job.in[s].data, job.in[s].dtype, row * job.in[s].row_stride + i, n, buffers[s]);
  use(in);
}

// The sums of a segment; with kMap also its map, which must not wait for them.
template <bool kMap>
struct SumSegment {
  template <class F, class T, int N>
  static FASTGEN_HD void run(const RowwiseJob<F, T, N>& job, int64_t row, typename F::Row constants, int64_t segment,
                             double* sums) {
    alignas(64) T buffers[N][kChunk];
    alignas(64) [[maybe_unused]] T result[kMap ? kChunk : 1], second[kMap && kMapsTwo<F> ? kChunk : 1];
    [[maybe_unused]] const auto coefficient = [&]() __attribute__((always_inline)) {
      if constexpr (kMap) return job.formula.coefficient(row, 0, constants, Slope<F, T>{});
      else return T(0);
    }();
    const int64_t end = job.end_of(segment);
    for (int64_t i = segment * kSegment; i < end; i += kChunk) {
      const int64_t n = std::min(kChunk, end - i);
      with_chunk<N>(job, row, i, n, buffers, [&](const auto* in) __attribute__((always_inline)) {
        accumulate_chunk<F, T>(job.formula, constants, in, n, sums, [&](int64_t j) __attribute__((always_inline)) {
          if constexpr (kMap) {
            T v[F::kMapStreams];
            for (int s = 0; s < F::kMapStreams; ++s) v[s] = in[s][j];
            result[j] = job.formula.map(constants, coefficient, v);
            if constexpr (kMapsTwo<F>) second[j] = job.formula.second(constants, v);
          }
        });
      });
      if constexpr (kMap) store<T>(job.out.data, job.out.dtype, row * job.size + i, n, result, job.streaming);
      if constexpr (kMap && kMapsTwo<F>)
        store<T>(job.second.data, job.second.dtype, row * job.size + i, n, second, job.streaming);
    }
  }
};

struct MapSegment {
  template <class F, class T, int N>
  static FASTGEN_HD void run(const RowwiseJob<F, T, N>& job, int64_t row, typename F::Row constants,
                             Coefficient<F, T> coefficient, int64_t segment) {
    alignas(64) T buffers[F::kMapStreams][kChunk];
    alignas(64) T result[kChunk];
    const bool direct = job.out.dtype == dtype_of<T>() && !job.streaming;
    const int64_t end = job.end_of(segment);
    for (int64_t i = segment * kSegment; i < end; i += kChunk) {
      const int64_t n = std::min(kChunk, end - i), at = row * job.size + i;
      T* to = direct ? static_cast<T*>(job.out.data) + at : result;
      with_chunk<F::kMapStreams>(job, row, i, n, buffers, [&](const auto* in) __attribute__((always_inline)) {
        const auto element = [&](int64_t j) __attribute__((always_inline)) {
          T v[F::kMapStreams];
          for (int s = 0; s < F::kMapStreams; ++s) v[s] = in[s][j];
          to[j] = job.formula.map(constants, coefficient, v);
        };
        int64_t j = 0;
        for (; j + kLanes <= n; j += kLanes) {
          for (int s = 0; s < F::kMapStreams; ++s) prefetch<kLanes>(in[s], j + kChunk);
#pragma GCC ivdep  // in place, `to` is one of the streams, element by element
          for (int l = 0; l < kLanes; ++l) element(j + l);
        }
        for (; j < n; ++j) element(j);
      });
      if (!direct) store<T>(job.out.data, job.out.dtype, at, n, result, job.streaming);
    }
  }
};

template <class F, class T, int N>
void reduce_segment(const RowwiseJob<F, T, N>& job, int64_t row, const typename F::Row& constants, int64_t segment,
                    double* sums) {
  if constexpr (kMapsAtOnce<F>)
    if (job.out.data) return run<SumSegment<true>>(job, row, constants, segment, sums);
  run<SumSegment<false>>(job, row, constants, segment, sums);
}

template <class F>
void parallel(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, f);
}

// Adds a row's segment sums, in order, to its group's.
template <class F, class T>
void add_row(const typename F::Row& constants, const double* segment_sums, int64_t segments, double* total) {
  for (int k = 0; k < F::kSums; ++k) {
    double sum = 0;
    for (int64_t s = 0; s < segments; ++s) sum += segment_sums[s * F::kSums + k];
    total[k] += static_cast<double>(constants.scale) * sum;
  }
}

template <class F, class T>
Slope<F, T> run_epilogue(const F& formula, int64_t group, const double* total) {
  T sums[F::kSums];
  for (int k = 0; k < F::kSums; ++k) sums[k] = static_cast<T>(total[k]);
  return formula.epilogue(group, sums);
}

// Whole groups [begin, end) on one thread: the map finds the group in the cache that the reduction filled.
template <class F, class T, int N>
void run_groups(const RowwiseJob<F, T, N>& job, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g) {
    Slope<F, T> slope{};
    if constexpr (F::kSums > 0) {
      double total[F::kSums] = {};
      for (int64_t r = 0; r < job.groups.rows; ++r) {
        const int64_t row = job.groups.row(g, r);
        const auto constants = job.formula.row(row, r);
        double sums[F::kSums] = {};
        for (int64_t s = 0; s < job.segments(); ++s) {
          double part[F::kSums] = {};
          reduce_segment(job, row, constants, s, part);
          for (int k = 0; k < F::kSums; ++k) sums[k] += part[k];
        }
        add_row<F, T>(constants, sums, 1, total);
      }
      slope = run_epilogue<F, T>(job.formula, g, total);
    }
    if constexpr (F::kMapStreams > 0 && !kMapsAtOnce<F>)
      for (int64_t r = job.groups.rows; r-- > 0;) {  // backwards: what was read last is still in the cache
        const int64_t row = job.groups.row(g, r);
        const auto constants = job.formula.row(row, r);
        const auto coefficient = job.formula.coefficient(row, r, constants, slope);
        if (job.out.data)
          for (int64_t s = job.segments(); s-- > 0;) run<MapSegment>(job, row, constants, coefficient, s);
      }
  }
  if (job.streaming) stream_fence();
}

// Segments [begin, end) of all rows, numbered row by row: their sums into scratch.
template <class F, class T, int N>
void reduce_segments(const RowwiseJob<F, T, N>& job, double* scratch, int64_t begin, int64_t end) {
  if constexpr (F::kSums > 0)
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = i / job.segments(), rank = index % job.groups.rows;
      const int64_t row = job.groups.row(index / job.groups.rows, rank);
      double part[F::kSums] = {};
      reduce_segment(job, row, job.formula.row(row, rank), i % job.segments(), part);
      for (int k = 0; k < F::kSums; ++k) scratch[i * F::kSums + k] = part[k];
    }
  if (kMapsAtOnce<F> && job.streaming) stream_fence();
}

// The same segments, mapped with the coefficients [row].
template <class F, class T, int N, class C>
void map_segments(const RowwiseJob<F, T, N>& job, const C* coefficients, int64_t begin, int64_t end) {
  if constexpr (F::kMapStreams > 0 && !kMapsAtOnce<F>)
    for (int64_t i = end; i-- > begin;) {  // backwards too
      const int64_t index = i / job.segments(), rank = index % job.groups.rows;
      const int64_t row = job.groups.row(index / job.groups.rows, rank);
      run<MapSegment>(job, row, job.formula.row(row, rank), coefficients[index], i % job.segments());
    }
  if (job.streaming) stream_fence();
}

// Few long rows: threads share a row's segments; the epilogues run in between, on one thread.
template <class F, class T, int N>
void split_rows(const RowwiseJob<F, T, N>& job) {
  const int64_t segments = job.segments(), rows = job.groups.count * job.groups.rows;
  std::vector<Slope<F, T>> slopes(job.groups.count);
  if constexpr (F::kSums > 0) {
    std::vector<double> parts(rows * segments * F::kSums);
    parallel(rows * segments, [&](int64_t a, int64_t b) { reduce_segments(job, parts.data(), a, b); });
    for (int64_t g = 0; g < job.groups.count; ++g) {
      double total[F::kSums] = {};
      for (int64_t r = 0; r < job.groups.rows; ++r)
        add_row<F, T>(job.formula.row(job.groups.row(g, r), r),
                      &parts[(g * job.groups.rows + r) * segments * F::kSums], segments, total);
      slopes[g] = run_epilogue<F, T>(job.formula, g, total);
    }
  }
  if constexpr (F::kMapStreams > 0 && !kMapsAtOnce<F>) {
    std::vector<Coefficient<F, T>> coefficients(rows);
    for (int64_t g = 0; g < job.groups.count; ++g) {
      for (int64_t r = 0; r < job.groups.rows; ++r) {
        const int64_t row = job.groups.row(g, r);
        coefficients[g * job.groups.rows + r] = job.formula.coefficient(row, r, job.formula.row(row, r), slopes[g]);
      }
    }
    if (job.out.data)
      parallel(rows * segments, [&](int64_t a, int64_t b) { map_segments(job, coefficients.data(), a, b); });
  }
}

// Runs `formula` over the first F::kStreams streams of `rows`, writing to `out` if it has data, and to `second`.
template <class T, class F, int N>
void rowwise(const F& formula, const Groups& groups, const Rows<N>& rows, Output out, Output second) {
  static_assert(F::kStreams == N && F::kMapStreams <= N && (!kMapsTwo<F> || kMapsAtOnce<F>));
  const int64_t elements = groups.count * groups.rows * rows.size;
  const bool streaming = out.data && elements * static_cast<int64_t>(element_bytes(out.dtype)) >= kStreamingBytes;
  const bool brain = std::all_of(rows.stream.begin(), rows.stream.end(), [](const Stream& s) {
    return s.dtype == ScalarType::BFloat16;
  });
  const RowwiseJob<F, T, N> job{formula, groups, rows.size, rows.stream, out, second, streaming, brain};
  const int64_t threads = torch::stable::get_num_threads();
  // Groups that come out even take one pass over the threads, and the map finds more of them in the cache.
  const bool uneven = groups.count < 4 * threads && groups.count % threads != 0;
  const bool few = uneven && groups.rows * job.segments() > 1;
  if (elements <= kSerialElements || threads == 1) run_groups(job, 0, groups.count);
  else if (few) split_rows(job);
  else parallel(groups.count, [&](int64_t a, int64_t b) { run_groups(job, a, b); });
}

}  // namespace fastgen::cpu
