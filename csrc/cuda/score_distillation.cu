#include "../operators/score_distillation.h"

#include "device.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { fastgen::register_score_distillation<fastgen::cuda::Device>(m); }
