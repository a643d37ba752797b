#include "../operators/sequence.h"

#include "device.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { fastgen::register_sequence<fastgen::cuda::Device>(m); }
