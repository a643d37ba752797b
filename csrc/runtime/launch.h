// Launches: on PyTorch's current stream, on the tensors' device, with the result of each checked.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "partition.h"

namespace fastgen::cuda {

constexpr int kCounters = 256;

// A number of its own for each stream of a device, below kCounters; negative where there are no more, or where the
// stream is being captured.
inline int counter_of(int device, cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  unsigned long long id;  // a handle may be another stream's, once that one is gone
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess || cudaStreamGetId(stream, &id) != cudaSuccess) {
    cudaGetLastError();  // a capture elsewhere forbids it; whether it forbids the launch too, that will say
    return -1;
  }
  if (status != cudaStreamCaptureStatusNone) return -1;
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, int> numbers;
  const std::lock_guard lock(mutex);
  const auto known = numbers.find({device, id});
  if (known != numbers.end()) return known->second;
  if (numbers.size() == kCounters) return -1;
  return numbers.emplace(std::pair(device, id), static_cast<int>(numbers.size())).first->second;
}

// Makes the device of a tensor current, and knows its current stream.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  int device;
  cudaStream_t stream;

  explicit Launch(const torch::stable::Tensor& on) : guard(on.device().index()) {
    STD_CUDA_CHECK(cudaGetDevice(&device));
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, int64_t shared_bytes, int cluster,
                  const Arguments&... arguments) const {
    if (blocks == 0) return;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    // Fits: a block has 128 groups or a few hundred elements at least, and 2^31 blocks of those fit in no memory.
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = threads;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }
};

inline int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline int multiprocessors_of(int device) {
  static const std::vector<int> counts = [] {
    int devices = 0;
    STD_CUDA_CHECK(cudaGetDeviceCount(&devices));
    std::vector<int> all;
    for (int d = 0; d < devices; ++d) all.push_back(attribute_of(d, cudaDevAttrMultiProcessorCount));
    return all;
  }();
  return counts[device];
}

// A limit lowered by an environment variable, for benchmarks/tune.py to try.
inline int lowered(int most, const char* variable) {
  const char* text = std::getenv(variable);
  return text ? std::clamp(std::atoi(text), 1, most) : most;
}

// Lets `kernel` use all the shared memory and the largest clusters that the current device grants it, and says what
// those are. Asks once per kernel and device (a race writes the same answer twice).
template <auto kernel, int threads>
Limits limits_of(int device) {
  struct Granted {
    std::atomic<int> shared_bytes{-1}, cluster{1};
  };
  constexpr int kDevices = 64;
  static Granted granted[kDevices];
  Granted fresh;
  Granted& known = device < kDevices ? granted[device] : fresh;
  if (known.shared_bytes < 0) {
    const auto function = reinterpret_cast<const void*>(kernel);
    cudaFuncAttributes facts;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&facts, function));
    const int fixed = static_cast<int>(facts.sharedSizeBytes);
    const int most = attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin) - fixed;
    STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    int cluster = 1;
    if (attribute_of(device, cudaDevAttrClusterLaunch)) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(kMaxCluster);
      config.blockDim = dim3(threads);
      config.dynamicSmemBytes = static_cast<size_t>(most);
      const bool knows = cudaOccupancyMaxPotentialClusterSize(&cluster, kernel, &config) == cudaSuccess;
      cluster = knows ? std::clamp(cluster, 1, kMaxCluster) : 1;
      if (!knows) cudaGetLastError();  // no clusters then; not an error of the launch that follows
    }
    known.cluster = cluster;
    known.shared_bytes = most;
  }
  static const int most_threads = ceil_div(lowered(threads, "FASTGEN_CUDA_THREADS"), 32) * 32;
  static const int most_blocks = lowered(kMaxCluster, "FASTGEN_CUDA_CLUSTER");
  const int cluster = known.cluster;
  return {multiprocessors_of(device), known.shared_bytes, std::min(cluster, most_blocks), most_threads};
}

}  // namespace fastgen::cuda
