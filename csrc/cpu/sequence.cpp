#include "../operators/sequence.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { fastgen::register_sequence<fastgen::cpu::Device>(m); }
