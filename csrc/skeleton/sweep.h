// The sweep skeleton on a CPU (formula.h says what its formulas are): a thread takes rows one by one and
// has a row in its cache from the first pass, which finds maximum and sum, to the last, which writes the gradient.
//
// Sums have one fixed tree whatever the number of threads: kLanes interleaved partial sums in a chunk, chunks added in
// float64 in order. A row's last chunk is padded with -inf, whose probability is 0.
#pragma once

#include <atomic>
#include <memory>

#include "../runtime/token_rows.h"
#include "exp.h"
#include "rowwise.h"

namespace fastgen::cpu {

template <class F, class T>
struct SweepJob {
  static constexpr bool kBaselineOnly = std::is_same_v<T, double>;
  F formula;
  int64_t count, size, width;  // rows, columns that are read, columns of the output
  std::array<TokenStream, F::kStreams> in;
  Output out;
  bool streaming;
  int64_t grab;                // rows that a thread takes at a time
  std::atomic<int64_t>* next;  // rows that follow labels are uneven work: threads take them as they come
  T* scratch;                  // [workers][kParts][padded]
  int64_t padded;              // size, in whole lanes
};

template <class T>
struct Chunk {
  const T* values;
  int64_t n;  // a multiple of kLanes
};

// Columns [begin, begin + kChunk) of a row in T, padded to whole lanes.
template <class T>
FASTGEN_HD Chunk<T> load_chunk(const TokenStream& in, int64_t row, int64_t begin, int64_t size, T* buffer) {
  const int64_t n = std::min(kChunk, size - begin), padded = (n + kLanes - 1) / kLanes * kLanes;
  const T* values = load(in.data, in.dtype, in.offset(row) + begin, n, buffer);
  if (padded == n) return {values, n};
  if (values != buffer) std::memcpy(buffer, values, n * sizeof(T));
  for (int64_t i = n; i < padded; ++i) buffer[i] = -static_cast<T>(INFINITY);
  return {buffer, padded};
}

template <class T>
FASTGEN_HD T lanes_max(T* lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] = lanes[l + width] > lanes[l] ? lanes[l + width] : lanes[l];
  return lanes[0];
}

template <class T>
FASTGEN_HD T lanes_sum(T* lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

template <class T>
struct NormalizeJob {
  static constexpr bool kBaselineOnly = std::is_same_v<T, double>;
  TokenStream in;
  int64_t size;
  T inverse_temperature;
};

// Maximum and Σ exp in one pass over memory: a chunk stays in L1 from its maximum to its sum.
template <class T>
struct Normalize {
  static FASTGEN_HD void run(const NormalizeJob<T>& job, int64_t row, Softmax<T>* out) {
    alignas(64) T buffer[kChunk];
    T max = -static_cast<T>(INFINITY);
    double sum = 0;
    for (int64_t begin = 0; begin < job.size; begin += kChunk) {
      const Chunk<T> chunk = load_chunk(job.in, row, begin, job.size, buffer);
      T largest[kLanes];
      for (int l = 0; l < kLanes; ++l) largest[l] = chunk.values[l];
      for (int64_t i = kLanes; i < chunk.n; i += kLanes)
        for (int l = 0; l < kLanes; ++l) {
          const T v = chunk.values[i + l];
          largest[l] = v > largest[l] ? v : largest[l];
        }
      const T top = lanes_max(largest);
      if (top > max) {
        sum *= std::exp(static_cast<double>((max - top) * job.inverse_temperature));  // 0 at first
        max = top;
      }
      const T base = base_of(max);
      T lanes[kLanes] = {};
      for (int64_t i = 0; i < chunk.n; i += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] += exp_of((chunk.values[i + l] - base) * job.inverse_temperature);
      sum += static_cast<double>(lanes_sum(lanes));
    }
    *out = {max, static_cast<T>(sum)};
  }
};

template <class T>
FASTGEN_HD T element_at(const TokenStream& in, int64_t row, int64_t column) {
  T one = T(0);
  return *load(in.data, in.dtype, in.offset(row) + column, 1, &one);
}

// Runs the formula over a chunk's elements. parts[k] + i is where part k of element i goes.
template <class F, class T>
FASTGEN_HD void elements(const F& formula, const typename F::Row& row, const T* const* in, int64_t n, T* const* parts,
                         double* sums) {
  T lanes[F::kSums + 1][kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      T v[F::kStreams], part[F::kParts], add[F::kSums + 1] = {};
      for (int s = 0; s < F::kStreams; ++s) v[s] = in[s][i + l];
      formula.element(row, v, part, add);
      for (int k = 0; k < F::kParts; ++k) parts[k][i + l] = part[k];
      for (int k = 0; k < F::kSums; ++k) lanes[k][l] += add[k];
    }
  for (int k = 0; k < F::kSums; ++k) sums[k] += static_cast<double>(lanes_sum(lanes[k]));
}

template <class F, class T>
FASTGEN_HD void write_chunk(const SweepJob<F, T>& job, int64_t row, const typename F::Row& constants, int64_t begin,
                            const T* const* parts) {
  alignas(64) T result[kChunk];
  const int64_t n = std::min(kChunk, job.size - begin);
  for (int64_t i = 0; i < n; ++i) {
    T part[F::kParts];
    for (int k = 0; k < F::kParts; ++k) part[k] = parts[k][i];
    result[i] = job.formula.map(constants, part);
  }
  if constexpr (requires { job.formula.map_picked(constants, T(0)); }) {
    const int64_t picked = job.formula.picked(row);
    if (picked >= begin && picked < begin + n)
      result[picked - begin] = job.formula.map_picked(constants, element_at<T>(job.in[0], row, picked));
  }
  store<T>(job.out.data, job.out.dtype, row * job.width + begin, n, result, job.streaming);
}

// Takes the elements of a row; without sums to wait for it writes them too.
struct SweepElements {
  template <class F, class T>
  static FASTGEN_HD void run(const SweepJob<F, T>& job, int64_t row, typename F::Row constants, T* scratch,
                             double* sums) {
    alignas(64) T buffers[F::kStreams][kChunk];
    alignas(64) T parts_buffer[F::kParts][kChunk];
    for (int64_t begin = 0; begin < job.size; begin += kChunk) {
      const T* in[F::kStreams];
      int64_t n = 0;
      for (int s = 0; s < F::kStreams; ++s) {
        const Chunk<T> chunk = load_chunk(job.in[s], row, begin, job.size, buffers[s]);
        in[s] = chunk.values, n = chunk.n;
      }
      T* parts[F::kParts];
      for (int k = 0; k < F::kParts; ++k) parts[k] = scratch ? scratch + k * job.padded + begin : parts_buffer[k];
      elements<F, T>(job.formula, constants, in, n, parts, sums);
      if constexpr (F::kSums == 0) write_chunk(job, row, constants, begin, parts);
    }
  }
};

// Writes a row whose parts are in `scratch`.
struct SweepWrite {
  template <class F, class T>
  static FASTGEN_HD void run(const SweepJob<F, T>& job, int64_t row, typename F::Row constants, const T* scratch) {
    for (int64_t begin = 0; begin < job.size; begin += kChunk) {
      const T* parts[F::kParts];
      for (int k = 0; k < F::kParts; ++k) parts[k] = scratch + k * job.padded + begin;
      write_chunk(job, row, constants, begin, parts);
    }
  }
};

template <class F, class T>
void write_zeros(const SweepJob<F, T>& job, int64_t row, int64_t begin) {
  alignas(64) T zeros[kChunk] = {};
  for (; begin < job.width; begin += kChunk)
    store<T>(job.out.data, job.out.dtype, row * job.width + begin, std::min(kChunk, job.width - begin), zeros,
             job.streaming);
}

template <class F, class T>
void sweep_row(const SweepJob<F, T>& job, int64_t row, T* scratch) {
  if (job.formula.ignored(row)) {
    job.formula.ignore(row);
    if (job.out.data) write_zeros(job, row, 0);
    return;
  }
  Softmax<T> normal[F::kStreams];
  if constexpr (F::kNormalizes)
    for (int s = 0; s < F::kStreams; ++s)
      run<Normalize<T>>(NormalizeJob<T>{job.in[s], job.size, job.formula.inverse_temperature}, row, &normal[s]);
  auto constants = job.formula.row(row, normal);
  double sums[F::kSums + 1] = {};
  if constexpr (F::kParts > 0) run<SweepElements>(job, row, constants, scratch, &sums[0]);
  T total[F::kSums + 1];
  for (int k = 0; k < F::kSums; ++k) total[k] = static_cast<T>(sums[k]);
  job.formula.epilogue(row, constants, total);
  if constexpr (requires { job.formula.pick(row, constants, T(0)); }) {
    const int64_t picked = job.formula.picked(row);
    if (picked >= 0 && picked < job.size) job.formula.pick(row, constants, element_at<T>(job.in[0], row, picked));
  }
  if constexpr (F::kParts > 0 && F::kSums > 0)
    if (job.out.data) run<SweepWrite>(job, row, constants, static_cast<const T*>(scratch));
  if (job.out.data) write_zeros(job, row, job.size);
}

// What one worker does: it takes rows until there are none.
template <class F, class T>
void sweep_rows(const SweepJob<F, T>& job, int64_t worker) {
  T* scratch = job.scratch ? job.scratch + worker * F::kParts * job.padded : nullptr;
  for (;;) {
    const int64_t begin = job.next->fetch_add(job.grab, std::memory_order_relaxed);
    if (begin >= job.count) break;
    const int64_t end = std::min(job.count, begin + job.grab);
    for (int64_t row = begin; row < end; ++row) sweep_row(job, row, scratch);
  }
  if (job.streaming) stream_fence();
}

// Runs `formula` over rows of logits, writing to `out`, [..., width], if it has data.
template <class T, class F, int N>
void sweep(const F& formula, const TokenRows<N>& rows, Output out, int64_t width) {
  static_assert(F::kStreams == N);
  const int64_t padded = (rows.size + kLanes - 1) / kLanes * kLanes;
  const int64_t elements = rows.count * rows.size, bytes = rows.count * width * element_bytes(out.dtype);
  const int64_t grab = std::max<int64_t>(1, kSegment / padded);
  const int64_t workers = elements <= kSerialElements
                              ? 1
                              : std::min<int64_t>(torch::stable::get_num_threads(), (rows.count + grab - 1) / grab);
  std::unique_ptr<T[]> scratch;
  if constexpr (F::kSums > 0 && F::kParts > 0)
    if (out.data) scratch.reset(new T[workers * F::kParts * padded]);  // not zeroed
  std::atomic<int64_t> next{0};
  const SweepJob<F, T> job{formula, rows.count, rows.size,     width, rows.stream,
                           out,     out.data && bytes >= kStreamingBytes, grab,  &next, scratch.get(), padded};
  if (rows.count == 0) return;
  if (workers == 1) sweep_rows(job, 0);
  else parallel(workers, [&](int64_t worker, int64_t) { sweep_rows(job, worker); });
}

}  // namespace fastgen::cpu
