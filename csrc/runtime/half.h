// The 16-bit types in plain integer arithmetic, which compilers vectorise at any level. Rounds to nearest even.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../skeleton/formula.h"

namespace fastgen {

using torch::headeronly::ScalarType;

FASTGEN_HD uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
FASTGEN_HD float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

FASTGEN_HD float bfloat16_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

FASTGEN_HD uint16_t float_to_bfloat16(float f) {
  const uint32_t u = bits_of(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

FASTGEN_HD float float16_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  // Re-bias the exponent by a multiplication with 2^112, which also normalises subnormals.
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const uint32_t special = 0x7f800000u | (magnitude << 13);
  return float_of((magnitude >= 0x7c00u ? special : finite) | (static_cast<uint32_t>(h & 0x8000u) << 16));
}

FASTGEN_HD uint16_t float_to_float16(float f) {
  const uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000u, x = u & 0x7fffffffu;
  const uint32_t normal = (x + 0xc8000fffu + ((x >> 13) & 1u)) >> 13;
  // Adding 0.5 lines a subnormal's last bit up with that of the sum, so the addition rounds it to nearest even.
  const uint32_t subnormal = bits_of(float_of(x) + 0.5f) - 0x3f000000u;
  const uint32_t special = x > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>(sign | (x >= 0x47800000u ? special : (x < 0x38800000u ? subnormal : normal)));
}

// v as a tensor of `dtype` keeps it: a double becomes a half through float, as in PyTorch's conversions.
template <ScalarType kDtype, class T>
FASTGEN_HD T as_stored(T v) {
  if constexpr (kDtype == ScalarType::Double) return v;
  const float narrow = static_cast<float>(v);
  if constexpr (kDtype == ScalarType::BFloat16) return static_cast<T>(bfloat16_to_float(float_to_bfloat16(narrow)));
  else if constexpr (kDtype == ScalarType::Half) return static_cast<T>(float16_to_float(float_to_float16(narrow)));
  else return static_cast<T>(narrow);
}

// Calls f with a constant of the dtype.
template <class F>
void with_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::BFloat16: return f(std::integral_constant<ScalarType, ScalarType::BFloat16>{});
    case ScalarType::Half: return f(std::integral_constant<ScalarType, ScalarType::Half>{});
    case ScalarType::Double: return f(std::integral_constant<ScalarType, ScalarType::Double>{});
    default: return f(std::integral_constant<ScalarType, ScalarType::Float>{});
  }
}

}  // namespace fastgen
