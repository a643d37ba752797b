// fastgen._C: the CPU kernels, and facts about this build. The operators' schemas are defined in Python
// (fastgen/core/operator.py), so that they exist with or without this extension; importing it adds the implementations.
#include <pybind11/pybind11.h>

#include "isa.h"

#define FASTGEN_STRING_(x) #x
#define FASTGEN_STRING(x) FASTGEN_STRING_(x)

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch_target"] = FASTGEN_STRING(TORCH_TARGET_VERSION);
  info["flags"] = FASTGEN_FLAGS;
#if defined(__x86_64__)
  info["isa_built"] = "baseline, avx2, avx512";
#else
  info["isa_built"] = "baseline";
#endif
  info["isa_used"] = fastgen::cpu::isa_name(fastgen::cpu::isa());
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastgen's CPU kernels, registered as torch.ops.fastgen.*";
  m.def("build_info", &build_info);
}
