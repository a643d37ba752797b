#include "../operators/gradient.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { fastgen::register_gradient<fastgen::cpu::Device>(m); }
