// The sweep skeleton on a GPU: which kernels of sweep_kernels.cuh run, and how they divide the rows.
#pragma once

#include "rowwise.cuh"
#include "sweep_kernels.cuh"

namespace fastgen::cuda {

// Blocks that hold a row at most, where there are rows for all multiprocessors. A longer one is read again by so many
// blocks: on an H200 that takes a fifth less than sixteen that hold it and wait for each other.
constexpr int kHolders = 4, kReaders = 2;

// `held_bytes`: of one vector, that later passes want of all streams or of what the map wants.
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
    plan.slot = held_bytes / 16 * plan.threads;
    plan.shared_bytes = int64_t{1} * held_bytes * plan.slots * plan.threads;
    const bool idle_device = rows * plan.parts < 2 * limits.multiprocessors;
    if (plan.parts * 2 > limits.cluster || plan.share <= 512 || !(plan.shared_bytes > comfortable || idle_device)) break;
  }
  const bool fills_device = rows * kReaders >= 2 * limits.multiprocessors;
  if (plan.slots > 0 && fills_device && (plan.parts > kHolders || plan.shared_bytes > comfortable)) {
    plan.parts = std::min(kReaders, limits.cluster);
    plan.share = static_cast<int>(ceil_div<int64_t>(vectors, plan.parts));
    plan.threads = team_threads(std::max(plan.share, 33), limits.threads);
    plan.slots = 0, plan.shared_bytes = 0;
  }
  if (plan.shared_bytes > limits.shared_bytes) plan.slots = 0, plan.shared_bytes = 0;
  return plan;
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
  if (F::kSums > 0 && F::kNormalizes) {  // else the first pass over a row is the last
    for (const TokenStream& s : job.in) held_bytes += std::max(bytes_of<false>(s.dtype) * kWidth<T>, 16);
    if (out.data && !kMapsAtOnce<F>) held_bytes = std::max(held_bytes, F::kParts * 32);
  }
  const auto run = [&](auto access, auto alike) {
    if (access() == Access::peeled) ++job.vectors;
    const auto kernel = &sweep_rows<access(), alike(), T, F, N>;
    const Limits limits = limits_of<&sweep_rows<access(), alike(), T, F, N>, kSweepThreads>(launch.device);
    const SweepPlan plan = plan_sweep(rows.count, job.vectors, held_bytes, kGathers<F>, limits);
    launch(kernel, rows.count * plan.parts, dim3(plan.threads), plan.shared_bytes, kGathers<F> ? plan.parts : 1, job,
           plan);
  };
  constexpr std::integral_constant<ScalarType, ScalarType::Undefined> any;
  if (is_wide(job, rows.count)) {
    if constexpr (sizeof(T) == 4) {  // what language models are trained in
      bool alike = !out.data || out.dtype == ScalarType::BFloat16;
      for (const TokenStream& s : job.in) alike &= s.dtype == ScalarType::BFloat16;
      if (alike)
        return run(std::integral_constant<Access, Access::wide>{},
                   std::integral_constant<ScalarType, ScalarType::BFloat16>{});
    }
    return run(std::integral_constant<Access, Access::wide>{}, any);
  }
  if constexpr (sizeof(T) == 4)  // float64 is for checks
    if (is_peelable(job, rows.count)) return run(std::integral_constant<Access, Access::peeled>{}, any);
  run(std::integral_constant<Access, Access::single>{}, any);
}

}  // namespace fastgen::cuda
