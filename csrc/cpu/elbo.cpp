#include "../operators/elbo.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { fastgen::register_elbo<fastgen::cpu::Device>(m); }
