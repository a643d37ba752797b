#include "../operators/sampling.h"

#include "device.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { fastgen::register_sampling<fastgen::cuda::Device>(m); }
