// The CUDA implementations of the operators, emulated, registered for CPU tensors.
#include <algorithm>

#include "cuda_runtime.h"
#include "operators/analytic_dpm.h"
#include "operators/elbo.h"
#include "operators/gradient.h"
#include "operators/sampling.h"
#include "operators/schedule.h"
#include "operators/score_distillation.h"
#include "operators/sequence.h"

#include "cuda/device.cuh"
#include "cuda/trajectory.cuh"

extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) { return *guard = nullptr, 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  return *message = nullptr, error;
}
void torch_c10_cuda_free_error_msg(char*) {}
}

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  fastgen::register_analytic_dpm<fastgen::cuda::Device>(m);
  fastgen::register_elbo<fastgen::cuda::Device>(m);
  fastgen::register_gradient<fastgen::cuda::Device>(m);
  fastgen::register_sampling<fastgen::cuda::Device>(m);
  fastgen::register_schedule<fastgen::cuda::Device>(m);
  fastgen::cuda::register_trajectory(m);
  fastgen::register_score_distillation<fastgen::cuda::Device>(m);
  fastgen::register_sequence<fastgen::cuda::Device>(m);
}
