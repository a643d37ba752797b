// The CUDA implementations of the operators, emulated, for CPU tensors.
#include <algorithm>

#define FASTGEN_EMULATED

#include "cuda_runtime.h"
#include "units.inc"  // csrc/units.py: every operator for CUDA, registered for the CPU

extern "C" {
__attribute__((visibility("default"))) long emulated_launches() { return emulator::launches; }

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) { return *guard = nullptr, 0; }
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  return *message = nullptr, error;
}
void torch_c10_cuda_free_error_msg(char*) {}
}
