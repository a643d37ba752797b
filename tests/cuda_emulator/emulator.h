// Runs CUDA kernels on a CPU, one OS thread, to check what they compute and how they synchronise where no GPU is at
// hand. Every CUDA thread is a fiber; all fibers of a cluster of blocks run interleaved, in a random order that changes
// at each barrier, and each runs from one barrier to the next without a break. So a missing barrier shows as a wrong
// result in some orders, a barrier that not all threads reach as a deadlock, which is reported, and a write to the
// shared memory of a block that has not started or has ended as an abort. What it cannot show: memory ordering weaker
// than that, alignment beyond what the compiler's sanitizer checks, and speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr std::size_t kStack = 64 << 10, kStaticShared = 8 << 10;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what);
  std::abort();
}

// Counts arrivals; the last of `expected` opens it.
struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
  int arrive() {
    const int mine = generation;
    if (++arrived == expected) arrived = 0, ++generation;
    return mine;
  }
  bool open(int token) const { return generation != token; }
};

struct Warp {
  Barrier barrier;
  unsigned char slot[2][32][16];  // two, so that a fast lane's next exchange spares what a slow one has yet to read
};

struct Block {
  dim3 index;
  std::vector<unsigned char> memory;
  std::vector<Warp> warps;
  Barrier barrier;
  int running = 0, late = 0;  // threads that have not ended; sweeps until the first starts
  bool started = false;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  dim3 thread;
  int number = 0, cluster_token = 0, exchanges = 0;
  bool done = false, progressed = false;
};

struct State {
  ucontext_t scheduler;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;  // kept from launch to launch
  Barrier cluster;
  Fiber* current = nullptr;
  std::function<void()> body;
  std::mt19937 random{12345};
};
inline State state;

inline void yield() { swapcontext(&state.current->context, &state.scheduler); }

template <class Ready>
void wait(const Ready& ready) {
  while (!ready()) yield();
  state.current->progressed = true;
}

inline void run_fiber() {
  state.body();
  Fiber& fiber = *state.current;
  fiber.done = true;
  fiber.progressed = true;
  // A block that has ended keeps this pattern; see run_cluster.
  if (--fiber.block->running == 0) std::memset(fiber.block->memory.data(), 0xee, fiber.block->memory.size());
  yield();
}

inline void resume(Fiber& fiber) {
  state.current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block->index;
  if (!fiber.block->started) {  // NaN everywhere, over what other blocks have written too early
    fiber.block->started = true;
    std::memset(fiber.block->memory.data(), 0xff, fiber.block->memory.size());
  }
  fiber.progressed = false;
  swapcontext(&state.scheduler, &fiber.context);
}

inline void prepare(Block& block, int number, dim3 threads, std::size_t dynamic_shared) {
  const int count = static_cast<int>(threads.x * threads.y);
  if (count % 32 || count > 1024) fail("blocks must be whole warps, at most 32");
  block.index = dim3(static_cast<unsigned>(number));
  block.memory.assign(kStaticShared + dynamic_shared, 0);
  block.warps.resize(count / 32);
  for (auto& warp : block.warps) warp.barrier.expected = 32;
  block.barrier.expected = block.running = count;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = state.fibers.emplace_back();
    fiber.block = &block;
    fiber.number = i;
    fiber.thread = dim3(i % threads.x, i / threads.x);
  }
}

inline void start(Fiber& fiber) {
  if (state.stacks.empty()) state.stacks.emplace_back(new char[kStack]);
  fiber.stack = std::move(state.stacks.back());
  state.stacks.pop_back();
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

inline void run_cluster(int first, int blocks, dim3 threads, std::size_t dynamic_shared) {
  state.fibers.clear();
  state.blocks.assign(blocks, Block{});
  state.fibers.reserve(static_cast<std::size_t>(blocks) * threads.x * threads.y);
  for (int b = 0; b < blocks; ++b) {
    prepare(state.blocks[b], first + b, threads, dynamic_shared);
    if (blocks > 1) state.blocks[b].late = static_cast<int>(state.random() % 32);
  }
  state.cluster = Barrier{static_cast<int>(state.fibers.size())};
  std::vector<Fiber*> alive;
  int idle_sweeps = 0;
  for (auto& fiber : state.fibers) start(fiber), alive.push_back(&fiber);
  while (!alive.empty()) {
    std::shuffle(alive.begin(), alive.end(), state.random);
    bool progress = false;
    for (Block& block : state.blocks) progress |= block.late-- > 0;
    for (Fiber* fiber : alive)
      if (fiber->block->late < 0) resume(*fiber), progress |= fiber->progressed;
    idle_sweeps = progress ? 0 : idle_sweeps + 1;  // a barrier's last arrival lets nobody on before the next sweep
    if (idle_sweeps > 3) fail("deadlock: a barrier that some threads never reach");
    std::erase_if(alive, [](Fiber* fiber) { return fiber->done; });
  }
  for (auto& fiber : state.fibers) state.stacks.push_back(std::move(fiber.stack));
  for (auto& block : state.blocks)
    for (unsigned char byte : block.memory)
      if (byte != 0xee) fail("a block's shared memory was written after it had ended");
}

inline long launches = 0;

// With EMULATED_IDLE in the environment a launch does nothing, for what the host takes to be timed.
inline void launch(dim3 grid, dim3 threads, std::size_t dynamic_shared, int cluster, std::function<void()> body) {
  ++launches;
  static const bool idle = std::getenv("EMULATED_IDLE") != nullptr;
  if (idle) return;
  if (grid.x % cluster) fail("the grid is not a whole number of clusters");
  blockDim = threads;
  gridDim = grid;
  state.body = std::move(body);
  for (unsigned b = 0; b < grid.x; b += cluster) run_cluster(static_cast<int>(b), cluster, threads, dynamic_shared);
}

template <class T>
T& shared() {
  static_assert(sizeof(T) <= kStaticShared);
  return *reinterpret_cast<T*>(state.current->block->memory.data());
}
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(state.current->block->memory.data() + kStaticShared);
}

inline Warp& warp() { return state.current->block->warps[state.current->number / 32]; }

template <class T>
T exchange(T value, int source_lane) {
  Warp& w = warp();
  auto& slot = w.slot[state.current->exchanges++ % 2];
  std::memcpy(slot[state.current->number % 32], &value, sizeof(T));
  const int token = w.barrier.arrive();
  wait([&] { return w.barrier.open(token); });
  T result;
  std::memcpy(&result, slot[source_lane], sizeof(T));
  return result;
}

}  // namespace emulator

inline void __syncthreads() {
  auto& barrier = emulator::state.current->block->barrier;
  const int token = barrier.arrive();
  emulator::wait([&] { return barrier.open(token); });
}
inline void __syncwarp() { emulator::exchange(0, 0); }
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  const unsigned before = *p;
  *p = before >= last ? 0 : before + 1;
  return before;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  return emulator::exchange(value, (emulator::state.current->number % 32) ^ offset);
}
template <class T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  return emulator::exchange(value, emulator::state.current->number % 32 / width * width + source % width);
}

template <class V>
V __ldcs(const V* p) {
  return *p;
}
template <class V>
V __ldcg(const V* p) {
  return *p;
}
template <class V>
void __stcs(V* p, V v) {
  *p = v;
}

template <class To, class From>
To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __uint_as_float(unsigned u) { return bit_copy<float>(u); }
inline unsigned __float_as_uint(float f) { return bit_copy<unsigned>(f); }
inline double __hiloint2double(int hi, int lo) {
  return bit_copy<double>(static_cast<uint64_t>(static_cast<uint32_t>(hi)) << 32 | static_cast<uint32_t>(lo));
}
inline int __double2loint(double d) { return static_cast<int>(bit_copy<uint64_t>(d)); }
inline int __double2hiint(double d) { return static_cast<int>(bit_copy<uint64_t>(d) >> 32); }

namespace emulator {
// As far off as the hardware may be, in either direction: PTX grants both a relative 2^-22, and log2 between 1/2 and 2
// the same absolutely.
inline double hardware_error(float x) {
  const uint32_t bits = __float_as_uint(x) * 2654435761u;
  return (static_cast<double>(bits) / 2147483648.0 - 1.0) * 0x1p-22;
}
inline float hardware_exp2(float x) {
  const float y = static_cast<float>(std::exp2(static_cast<double>(x)) * (1.0 + hardware_error(x)));
  return y < 0x1p-126f ? 0.0f : y;  // subnormal
}
inline float hardware_log2(float x) {
  const double y = std::log2(static_cast<double>(x < 0x1p-126f ? 0.0f : x)), e = hardware_error(x);
  return static_cast<float>(x > 0.5f && x < 2.0f ? y + e : y * (1.0 + e));
}
}  // namespace emulator
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
