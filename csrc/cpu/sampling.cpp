#include "../operators/sampling.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { fastgen::register_sampling<fastgen::cpu::Device>(m); }
