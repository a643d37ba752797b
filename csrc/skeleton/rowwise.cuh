// The row-wise skeleton on a GPU: which kernels of rowwise_kernels.cuh run, and how they divide the rows.
#pragma once

#include "../runtime/launch.h"
#include "rowwise_kernels.cuh"

namespace fastgen::cuda {

// Whether every row starts where a vector of `width` elements may: at its own size, or at 16 bytes where it has more.
inline bool is_aligned(const void* data, int64_t rows, int64_t row_elements, int bytes, int width) {
  const int alignment = std::min(16, bytes * width);
  return reinterpret_cast<uintptr_t>(data) % alignment == 0 && (rows <= 1 || row_elements * bytes % alignment == 0);
}

template <class T, class F, int N>
RowwiseArguments<T, F, N> make_job(const F& formula, const Groups& groups, const Rows<N>& rows, const Output& out,
                                    const Output& second) {
  RowwiseArguments<T, F, N> job{formula, groups, rows.size, ceil_div<int64_t>(rows.size, kWidth<T>), {}, out, second};
  std::copy(rows.stream.begin(), rows.stream.end(), job.in);
  return job;
}

template <class T, class F, int N>
bool is_wide(const RowwiseArguments<T, F, N>& job, int64_t rows) {
  bool wide = job.size % kWidth<T> == 0;
  for (const Stream& s : job.in) wide &= is_aligned(s.data, rows, s.row_stride, bytes_of(s.dtype), kWidth<T>);
  const Output outs[] = {job.out, job.second};  // nvcc loses a list that a loop is over
  for (const Output& o : outs) wide &= !o.data || is_aligned(o.data, rows, job.size, bytes_of(o.dtype), kWidth<T>);
  return wide;
}

template <Access access, class T, class F, int N>
void launch_map(const Launch& launch, const RowwiseArguments<T, F, N>& job, const Slope<F, T>* slopes) {
  const MapPlan plan = plan_map(job.vectors, kBatch<access, F::kMapStreams>);
  const int64_t blocks = ceil_div<int64_t>(job.groups.count * job.groups.rows * plan.segments, plan.teams);
  // What may find nothing to do gets few blocks, which loop: then nothing takes no time.
  const int64_t most = MayBeIdle<F> ? 8 * multiprocessors_of(launch.device) : blocks;
  launch(&map<access, T, F, N>, std::min(blocks, most), dim3(plan.threads, plan.teams), 0, 1, job, slopes,
         plan.segments);
}

template <Access access, class T, class F, int N>
void launch_parts(const Launch& launch, const RowwiseArguments<T, F, N>& job, const Tensor& like, Total<T> total) {
  if (!total.few_for(kPartThreads)) total.counter = -1;
  const int64_t group_parts = job.groups.rows * ceil_div<int64_t>(job.vectors, kPartVectors);
  const int64_t parts = job.groups.count * group_parts;
  const auto dtype = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor scratch = new_vector(like, parts * F::kSums, ScalarType::Double);
  const Tensor slopes = new_vector(like, job.groups.count * kCount<Slope<F, T>>, dtype);
  launch(&part_sums<access, T, F, N>, parts, dim3(kPartThreads), 0, 1, job, mutable_data<double>(scratch));
  launch(&finish<T, F>, job.groups.count, dim3(kPartThreads), 0, 1, job.formula, mutable_data<const double>(scratch),
         group_parts, reinterpret_cast<Slope<F, T>*>(mutable_data<T>(slopes)), total);
  if constexpr (kMaps<F>)
    if (job.out.data) launch_map<access>(launch, job, reinterpret_cast<const Slope<F, T>*>(mutable_data<T>(slopes)));
  if (total.by_a_launch()) launch_sum(launch, total, kPartThreads);
}

template <Access access, class T, class F, int N>
void launch_groups(const Launch& launch, const RowwiseArguments<T, F, N>& job, const Tensor& like, Total<T> total) {
  int held_bytes = 0;
  if (kMaps<F> && job.out.data)
    for (int s = 0; s < F::kMapStreams; ++s) held_bytes += bytes_of(job.in[s].dtype) * kWidth<T>;
  const auto kernel = &on_chip<access, T, F, N>;
  const Limits limits = limits_of<&on_chip<access, T, F, N>, kGroupThreads<T, F>>(launch.device);
  const GroupPlan plan = plan_groups(job.groups.count, job.groups.rows * job.vectors, held_bytes, limits);
  if (!plan.on_chip) return launch_parts<access>(launch, job, like, total);
  if (!total.few_for(plan.threads * plan.teams)) total.counter = -1;
  launch(kernel, plan.blocks, dim3(plan.threads, plan.teams), plan.shared_bytes, plan.cluster, job, plan,
         total);
  if (total.by_a_launch()) launch_sum(launch, total, plan.threads * plan.teams);
}

// Runs `formula` over the first F::kStreams streams of `rows`, writing to `out` if it has data, and to `second`. Adds
// up the terms that its epilogues store, where `total` wants their sum.
template <class T, class F, int N>
void rowwise(const F& formula, const Groups& groups, const Rows<N>& rows, const Output& out, const Output& second,
             Total<T> total) {
  static_assert(F::kStreams == N && F::kMapStreams <= N);
  if (groups.count == 0 && !total.sum) return;
  const Launch launch(rows.tensors[0]);
  if (groups.count == 0) return launch_sum(launch, total);
  if (total.sum) total.counter = counter_of(launch.device, launch.stream);
  const auto job = make_job<T>(formula, groups, rows, out, second);
  const auto run = [&](auto access) {
    if constexpr (F::kSums == 0) launch_map<access()>(launch, job, static_cast<const Slope<F, T>*>(nullptr));
    else launch_groups<access()>(launch, job, rows.tensors[0], total);
  };
  if (is_wide(job, rows.count)) run(std::integral_constant<Access, Access::wide>{});
  else run(std::integral_constant<Access, Access::single>{});
}

}  // namespace fastgen::cuda
