#include "../operators/analytic_dpm.h"

#include "device.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { fastgen::register_analytic_dpm<fastgen::cuda::Device>(m); }
