#include "../operators/elbo.h"

#include "device.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { fastgen::register_elbo<fastgen::cuda::Device>(m); }
