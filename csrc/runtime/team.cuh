// Sums over teams of threads (part of a warp, a block, a cluster of blocks), in one fixed order. What threads have
// summed is added up in float64: where terms of both signs cancel, that halves the error for a few additions a thread.
#pragma once

#include <cooperative_groups.h>

#include "partition.h"

namespace fastgen::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTGEN_CLUSTERS 1
#else
#define FASTGEN_CLUSTERS 0
#endif

// What threads of a block, and blocks of a cluster, tell each other: K sums, and then one slope or several.
template <class T, int K, int Slopes = 1>
struct Exchange {
  T warp[K][32];
  T block[kMaxCluster][K];  // in the first block of a cluster: every block's sums
  T slope[Slopes];
};

// On every thread: the sum over its `width` neighbours, a power of two that divides 32. All 32 lanes must call.
template <class T>
__device__ __forceinline__ T warp_sum(T x, int width = 32) {
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

template <class T>
__device__ __forceinline__ T warp_max(T x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(~0u, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// On the first warp: the sums over a block of whole warps. One barrier: each warp's sums are there before warp 0 reads them.
template <class T, int K>
__device__ __forceinline__ void block_sum(T (&x)[K], T (&of_warps)[K][32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = warp_sum(x[k]);
  if (warps == 1) return;
  if (lane == 0)
    for (int k = 0; k < K; ++k) of_warps[k][warp] = x[k];
  __syncthreads();
  if (warp == 0)
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = warp_sum(lane < warps ? of_warps[k][lane] : T(0));
}

#if FASTGEN_CLUSTERS
// The cluster that this block belongs to. Three barriers; every thread of every block takes part in each:
//   joined   after it, all blocks run and their shared memory may be written (arrive() at the kernel's start, so that
//            nobody waits here in practice; relaxed, for nothing was written that others read);
//   sums     each block's sums are in the first block before that adds them up;
//   slope    the first block's answer is in every block before it is read there.
// Blocks write each other's shared memory between joined and sums (the first block's), and between sums and slope
// (everyone's). After the last barrier each block touches only its own, so none can leave too early. Where there is no
// slope to wait for, only the first block's memory was written, before `sums`, and others may leave after it.
struct Cluster {
  cooperative_groups::cluster_group group = cooperative_groups::this_cluster();

  __device__ __forceinline__ int rank() const { return static_cast<int>(group.block_rank()); }

  __device__ __forceinline__ static void arrive() { __cluster_barrier_arrive_relaxed(); }

  // On thread 0 of the first block: the sums of all blocks, in the order of their ranks.
  template <class T, int K, int Slopes>
  __device__ __forceinline__ void sum(T (&x)[K], Exchange<T, K, Slopes>& exchange) const {
    group.barrier_wait();  // joined
    if (threadIdx.x == 0) {
      T* mine = group.map_shared_rank(&exchange.block[rank()][0], 0);
      for (int k = 0; k < K; ++k) mine[k] = x[k];
    }
    __syncwarp();
    group.sync();  // sums
    if (threadIdx.x == 0 && rank() == 0)
      for (int k = 0; k < K; ++k) {
        x[k] = exchange.block[0][k];
        for (unsigned b = 1; b < group.num_blocks(); ++b) x[k] += exchange.block[b][k];
      }
  }

  // Puts the slopes of thread 0 of the first block into every block's `exchange`.
  template <class T, int K, int Slopes>
  __device__ __forceinline__ void broadcast(const T (&slope)[Slopes], Exchange<T, K, Slopes>& exchange) const {
    if (threadIdx.x == 0 && rank() == 0)
      for (unsigned b = 0; b < group.num_blocks(); ++b)
        for (int k = 0; k < Slopes; ++k) group.map_shared_rank(exchange.slope, b)[k] = slope[k];
    __syncwarp();
    group.sync();  // slope
  }
};
#endif

}  // namespace fastgen::cuda
