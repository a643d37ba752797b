#include "../operators/schedule.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { fastgen::register_schedule<fastgen::cpu::Device>(m); }
