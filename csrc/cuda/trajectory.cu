#include "trajectory.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) { fastgen::cuda::register_trajectory(m); }
