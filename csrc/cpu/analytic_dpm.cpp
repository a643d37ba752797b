#include "../operators/analytic_dpm.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { fastgen::register_analytic_dpm<fastgen::cpu::Device>(m); }
