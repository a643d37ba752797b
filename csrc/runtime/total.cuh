// The sum of a loss's terms, one of each group, by the block that is last to store its own: it takes no launch. Many
// terms are left to one, whose block has more threads.
//
// Blocks count themselves in once their terms are in global memory, and the count is 0 again after the last of them,
// ready for the next launch on the stream. Every stream has a counter of its own, for its launches do not overlap.
// Those in a CUDA graph may, as a graph runs on any stream, and beside itself: there the sum is a launch.
#pragma once

#include "launch.h"
#include "rows.h"
#include "team.cuh"

namespace fastgen::cuda {

static __device__ unsigned arrivals[kCounters];

template <class T>
struct Total {
  const T* terms = nullptr;
  int64_t count = 0;
  T* sum = nullptr;  // null: nobody asks for it
  int counter = -1;  // of the stream; negative: there is none

  // Whether so many threads add up soon: in a few rounds of loads, of which four are in flight.
  bool few_for(int threads) const { return count <= int64_t{16} * threads; }
  FASTGEN_HD bool by_last_block() const { return sum != nullptr && counter >= 0; }
  FASTGEN_HD bool by_a_launch() const { return sum != nullptr && counter < 0; }
};

// By all threads of a block, whole warps: the terms in float64, in an order that the number of threads decides.
template <class T>
__device__ __forceinline__ void add_up(const Total<T>& total, double (&partial)[32]) {
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  double sum = 0;
  for (int64_t i = thread; i < total.count; i += threads) sum += static_cast<double>(__ldcg(total.terms + i));
  sum = warp_sum(sum);
  if (thread % 32 == 0) partial[thread / 32] = sum;
  __syncthreads();
  if (thread < 32) {
    sum = warp_sum(thread < threads / 32 ? partial[thread] : 0.0);
    if (thread == 0) *total.sum = static_cast<T>(sum);
  }
}

// By all threads of the `blocks` blocks that store terms, at their end. `last` and `partial` are in shared memory that
// no thread needs any more once all of the block's threads are here.
template <class T>
__device__ __forceinline__ void add_up_if_last(const Total<T>& total, unsigned blocks, bool& last,
                                               double (&partial)[32]) {
  __syncthreads();  // the terms of all of the block's threads are stored
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    __threadfence();
    last = atomicInc(&arrivals[total.counter], blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (last) add_up(total, partial);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) sum_vector(const __grid_constant__ Total<T> total) {
  __shared__ Exchange<double, 1> exchange;
  add_up(total, exchange.warp[0]);
}

template <class T>
Total<T> total_of(const Tensor& terms, const Tensor& sum) {
  return {static_cast<const T*>(terms.const_data_ptr()), terms.numel(), mutable_data<T>(sum), -1};
}

// A launch of its own, after those that store the terms, by blocks of `threads`. Where such a block would have added
// up, in another launch of the same kernels, the sum is the same to the bit.
template <class T>
void launch_sum(const Launch& launch, const Total<T>& total, int threads = kMaxThreads) {
  launch(&sum_vector<T>, 1, dim3(total.few_for(threads) ? threads : kMaxThreads), 0, 1, total);
}

}  // namespace fastgen::cuda
