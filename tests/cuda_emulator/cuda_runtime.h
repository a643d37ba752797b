// The part of the CUDA runtime that csrc/runtime/launch.h uses. EMULATED_GPU = "multiprocessors,shared bytes,cluster".
// Where EMULATED_CAPTURE is set, the stream is being captured.
#pragma once

#include <tuple>

#include "emulator.h"

using cudaStream_t = void*;
using cudaError_t = int;

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

namespace emulator {
struct Gpu {
  int multiprocessors = 132, shared_bytes = 232448, cluster = 16;
  Gpu() {
    if (const char* text = std::getenv("EMULATED_GPU"))
      if (std::sscanf(text, "%d,%d,%d", &multiprocessors, &shared_bytes, &cluster) != 3) fail("EMULATED_GPU");
  }
};
inline const Gpu gpu;
}  // namespace emulator

constexpr cudaError_t cudaSuccess = 0;

inline cudaError_t cudaGetLastError() { return 0; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = std::getenv("EMULATED_CAPTURE") ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, 0;
}
inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) { return *id = 7, 0; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::gpu.multiprocessors
           : attribute == cudaDevAttrClusterLaunch     ? emulator::gpu.cluster > 1
                                                       : emulator::gpu.shared_bytes;
  return 0;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* facts, const void*) {
  facts->sharedSizeBytes = 1024;
  return 0;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return 0; }
template <class Kernel>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* cluster, Kernel, const cudaLaunchConfig_t*) {
  return *cluster = emulator::gpu.cluster, 0;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const std::tuple<Parameters...> all{arguments...};
  const int cluster = config->numAttrs ? static_cast<int>(config->attrs->val.clusterDim.x) : 1;
  if (std::getenv("EMULATED_TRACE"))
    std::fprintf(stderr, "launch grid %u block %ux%u shared %zu cluster %d\n", config->gridDim.x, config->blockDim.x,
                 config->blockDim.y, config->dynamicSmemBytes, cluster);
  emulator::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster,
                   [&] { std::apply(kernel, all); });
  return 0;
}
