#include "../operators/score_distillation.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) { fastgen::register_score_distillation<fastgen::cpu::Device>(m); }
