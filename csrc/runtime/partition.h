// How the CUDA skeleton divides rows over vectors, threads and blocks. Plain functions of numbers, the same on the
// host and the device, so that tests check them without a GPU (tests/test_aot_cuda.py).
#pragma once

#include "../skeleton/formula.h"

namespace fastgen::cuda {

constexpr int kMaxThreads = 1024;
constexpr int kMaxCluster = 16;  // above 8 a kernel must opt in, and not every device agrees
constexpr int kMapThreads = 256;
constexpr int kPartThreads = 256;
constexpr int kPartVectors = 8 * kPartThreads;  // of a row, summed by one block where a group does not fit on chip

// A thread takes a row in vectors of this many elements: 32 bytes of the arithmetic type T.
template <class T>
constexpr int kWidth = 32 / static_cast<int>(sizeof(T));

template <class I>
FASTGEN_HD constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

// The elements of one vector of a row where rows are not made of whole 16-byte pieces: start, start + stride, …,
// `count` of them.
struct Span {
  int64_t start;
  int stride, count;
};

// Vector v of the `vectors` = ceil(size / width) of a row. 32 of them interleave: the j-th elements of a warp's vectors
// are neighbours, so that accesses of single elements coalesce.
FASTGEN_HD Span span_of(int64_t v, int64_t vectors, int64_t size, int width) {
  const int64_t first = v / 32 * 32, behind = vectors - first;
  Span span;
  span.start = first * width + (v - first);
  span.stride = behind < 32 ? static_cast<int>(behind) : 32;
  const int64_t left = size - span.start, count = left <= 0 ? 0 : ceil_div<int64_t>(left, span.stride);
  span.count = count < width ? static_cast<int>(count) : width;
  return span;
}

// Vector v of a row whose elements `head`, `head` + width, … start at 16 bytes: vector 0 is what comes before them.
FASTGEN_HD Span peeled_span_of(int64_t v, int head, int64_t size, int width) {
  if (v == 0) return {0, 1, head < size ? head : static_cast<int>(size)};
  const int64_t start = head + (v - 1) * width, left = size - start;
  return {start, 1, left >= width ? width : left > 0 ? static_cast<int>(left) : 0};
}

// What a device allows a kernel.
struct Limits {
  int multiprocessors;
  int64_t shared_bytes;  // dynamic shared memory of a block
  int cluster;           // blocks in a cluster; 1 before sm_90
  int threads = kMaxThreads;  // of a block
};

// How groups of rows run on chip. A team of `threads`, within one warp or a whole block, takes a group's vectors, or
// one of `cluster` equal shares of them where a cluster of blocks has the group.
struct GroupPlan {
  bool on_chip;
  int threads, teams, cluster;  // threads of a team, teams of a block, blocks of a cluster
  int share, slots;             // vectors of a team, of a thread
  int64_t blocks, shared_bytes;
};

inline int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Four vectors a thread: enough loads in flight, and whole groups finish soon.
inline int team_threads(int64_t vectors, int most) {
  if (vectors <= 32) return power_of_two_from(vectors);
  const int64_t threads = ceil_div<int64_t>(ceil_div<int64_t>(vectors, 4), 32) * 32;
  return threads < most ? static_cast<int>(threads) : most;
}

// `vectors`: of one group; `held_bytes`: of one vector's map streams, kept in shared memory (0: nothing is mapped).
inline GroupPlan plan_groups(int64_t groups, int64_t vectors, int held_bytes, const Limits& limits) {
  GroupPlan plan{};
  if (vectors > int64_t{1} << 30) return plan;
  const int64_t comfortable = limits.shared_bytes / 2 - 2048;  // two blocks on a multiprocessor: one reads, one writes
  for (int cluster = 1;; cluster *= 2) {
    plan.cluster = cluster;
    plan.share = static_cast<int>(ceil_div<int64_t>(vectors, cluster));
    plan.threads = team_threads(plan.share, limits.threads);
    plan.teams = plan.threads <= 32 ? 128 / plan.threads : 1;
    plan.slots = ceil_div(plan.share, plan.threads);
    plan.shared_bytes = int64_t{1} * held_bytes * plan.slots * plan.threads * plan.teams;
    const bool crowded = plan.shared_bytes > comfortable;
    const bool idle_device = groups * cluster < 2 * limits.multiprocessors;
    // Halves of 512 vectors and more still need whole blocks: a cluster's blocks have one team each.
    if (cluster * 2 > limits.cluster || plan.share <= 512 || !(crowded || idle_device)) break;
  }
  plan.blocks = ceil_div<int64_t>(groups, plan.teams) * plan.cluster;
  const bool few_long = plan.blocks < limits.multiprocessors && plan.share > 16 * kMaxThreads;
  plan.on_chip = plan.shared_bytes <= limits.shared_bytes && !few_long;
  return plan;
}

// How rows are mapped with no sums to wait for: teams take segments of rows, each thread one batch of vectors.
struct MapPlan {
  int threads, teams;
  int64_t segments;  // of a row
};

inline MapPlan plan_map(int64_t vectors, int batch) {
  const int64_t wanted = ceil_div<int64_t>(vectors, batch);
  MapPlan plan;
  plan.threads = wanted <= 32             ? power_of_two_from(wanted)
                 : wanted >= kMapThreads ? kMapThreads
                                         : static_cast<int>(ceil_div<int64_t>(wanted, 32) * 32);
  plan.teams = kMapThreads / plan.threads;
  plan.segments = ceil_div<int64_t>(vectors, int64_t{1} * plan.threads * batch);
  return plan;
}

}  // namespace fastgen::cuda
