#include "../operators/schedule.h"

#include "device.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { fastgen::register_schedule<fastgen::cuda::Device>(m); }
