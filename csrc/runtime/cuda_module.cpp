// fastgen._C_cuda: the CUDA kernels, and facts about this build. Importing it adds the implementations to operators
// whose schemas fastgen/core/operator.py defines.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#define FASTGEN_STRING_(x) #x
#define FASTGEN_STRING(x) FASTGEN_STRING_(x)

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["architectures"] = FASTGEN_CUDA_ARCHITECTURES;
  info["torch_target"] = FASTGEN_STRING(TORCH_TARGET_VERSION);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "fastgen's CUDA kernels, registered as torch.ops.fastgen.*";
  m.def("build_info", &build_info);
}
