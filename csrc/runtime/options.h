// Options that are one of a few words. Their numbers are the order in fastgen/core/operator.py and the declarations.
#pragma once

#include <cstdint>

namespace fastgen {

enum class Reduction : int64_t { mean, sum, none, sum_per_batch };

// From the integer that an operator is called with.
template <class Option>
Option option(int64_t code) {
  return static_cast<Option>(code);
}

}  // namespace fastgen
