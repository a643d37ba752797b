#include "../operators/gradient.h"

#include "device.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { fastgen::register_gradient<fastgen::cuda::Device>(m); }
