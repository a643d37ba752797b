// Checks csrc/runtime/partition.h on many shapes: every element is in one vector, every vector with one thread, and a plan
// stays within what the device allows.
#include "runtime/partition.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace fastgen::cuda;

#define CHECK(condition)                                                                   \
  do {                                                                                     \
    if (!(condition)) std::printf("line %d: %s\n", __LINE__, #condition), std::exit(1);    \
  } while (0)

static void check_spans(int64_t size, int width) {
  const int64_t vectors = ceil_div<int64_t>(size, width);
  std::vector<int> visits(size);
  for (int64_t v = 0; v < vectors; ++v) {
    const Span span = span_of(v, vectors, size, width);
    CHECK(span.count >= 0 && span.count <= width);
    for (int j = 0; j < span.count; ++j) ++visits.at(span.start + j * span.stride);
  }
  for (int n : visits) CHECK(n == 1);
}

static void check_peeled_spans(int64_t size, int head, int width) {
  const int64_t vectors = ceil_div<int64_t>(size, width) + 1;
  std::vector<int> visits(size);
  for (int64_t v = 0; v < vectors; ++v) {
    const Span span = peeled_span_of(v, head, size, width);
    CHECK(span.stride == 1 && span.count >= 0 && span.count <= width);
    CHECK(v == 0 || (span.start - head) % width == 0);
    for (int j = 0; j < span.count; ++j) ++visits.at(span.start + j);
  }
  for (int n : visits) CHECK(n == 1);
}

static void check_plan(int64_t groups, int64_t vectors, int held_bytes, const Limits& limits) {
  const GroupPlan plan = plan_groups(groups, vectors, held_bytes, limits);
  if (!plan.on_chip) return;
  CHECK(plan.cluster >= 1 && plan.cluster <= limits.cluster && (plan.cluster & (plan.cluster - 1)) == 0);
  CHECK(int64_t{1} * plan.cluster * plan.share >= vectors);
  CHECK(int64_t{1} * plan.slots * plan.threads >= plan.share);
  CHECK(plan.shared_bytes <= limits.shared_bytes);
  CHECK(plan.shared_bytes >= int64_t{1} * held_bytes * plan.slots * plan.threads * plan.teams);
  CHECK(plan.threads * plan.teams <= kMaxThreads && plan.threads * plan.teams % 32 == 0);
  // A team is part of a warp, or a block's whole warps; a cluster's blocks have one team each.
  CHECK(plan.threads > 32 ? plan.threads % 32 == 0 && plan.teams == 1 : 32 % plan.threads == 0 && plan.cluster == 1);
  CHECK(plan.blocks % plan.cluster == 0 && plan.blocks / plan.cluster * plan.teams >= groups);
}

static void check_map(int64_t vectors, int batch) {
  const MapPlan plan = plan_map(vectors, batch);
  CHECK(plan.threads * plan.teams <= kMapThreads && plan.segments * plan.threads * batch >= vectors);
  CHECK(vectors == 0 || (plan.segments - 1) * plan.threads * batch < vectors);
}

int main() {
  for (int64_t size = 0; size < 1200; ++size) check_spans(size, 8), check_spans(size, 4);
  for (int64_t size = 0; size < 300; ++size)
    for (int head = 0; head < 8; ++head) check_peeled_spans(size, head, 8);
  const Limits devices[] = {{108, 166912, 1}, {132, 231424, 16}, {132, 231424, 8}, {84, 101376, 1}, {4, 3072, 2}};
  for (const Limits& limits : devices)
    for (int64_t vectors = 0; vectors < (int64_t{1} << 34); vectors += vectors < 3000 ? 1 : vectors / 3)
      for (int64_t groups : {1, 2, 3, 7, 64, 131, 500, 100000})
        for (int held : {0, 16, 32, 64, 96}) check_plan(groups, vectors, held, limits);
  for (int64_t vectors = 0; vectors < 100000; vectors += vectors < 3000 ? 1 : 997)
    check_map(vectors, 1), check_map(vectors, 2);
  std::puts("ok");
}
