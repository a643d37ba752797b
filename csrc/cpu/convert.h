// Loads and stores of every dtype as float or double, in plain arithmetic that compilers vectorise at any level.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "../formulas/formula.h"

namespace fastgen::cpu {

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

template <class T>
constexpr ScalarType dtype_of() {
  return std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
}

// n elements from `data` + offset as T: in place where the dtype is T's own, else converted into `buffer`.
template <class T>
FASTGEN_HD const T* load(const void* data, ScalarType dtype, int64_t offset, int64_t n, T* buffer) {
  if (dtype == dtype_of<T>()) return static_cast<const T*>(data) + offset;
  switch (dtype) {
    case ScalarType::Float: {
      const float* p = static_cast<const float*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(p[i]);
      break;
    }
    case ScalarType::BFloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(bfloat16_to_float(p[i]));
      break;
    }
    case ScalarType::Half: {
      const uint16_t* p = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(float16_to_float(p[i]));
      break;
    }
    case ScalarType::Bool: {
      const uint8_t* p = static_cast<const uint8_t*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(p[i]);
      break;
    }
    default:  // float64 into float does not occur: one float64 input makes the arithmetic float64
      break;
  }
  return buffer;
}

// Copies past the cache: a large output is not read again soon, and a plain store would first fetch its lines.
FASTGEN_HD void stream_bytes(void* to, const void* from, int64_t bytes) {
#if defined(__x86_64__)
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) & 15);
  if (bytes >= head + 16) {
    std::memcpy(out, in, head);
    int64_t i = head;
    for (; i + 16 <= bytes; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
    std::memcpy(out + i, in + i, bytes - i);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

FASTGEN_HD void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// n elements of T to `data` + offset in `dtype`.
template <class T>
FASTGEN_HD void store(void* data, ScalarType dtype, int64_t offset, int64_t n, const T* values, bool streaming) {
  uint16_t narrow[1024];
  float single[1024];
  const void* from = values;
  int64_t width = sizeof(T);
  if (dtype == ScalarType::BFloat16) {
    for (int64_t i = 0; i < n; ++i) narrow[i] = float_to_bfloat16(static_cast<float>(values[i]));
    from = narrow, width = 2;
  } else if (dtype == ScalarType::Half) {
    for (int64_t i = 0; i < n; ++i) narrow[i] = float_to_float16(static_cast<float>(values[i]));
    from = narrow, width = 2;
  } else if (dtype != dtype_of<T>()) {
    for (int64_t i = 0; i < n; ++i) single[i] = static_cast<float>(values[i]);
    from = single, width = 4;
  }
  char* to = static_cast<char*>(data) + offset * width;
  if (streaming) stream_bytes(to, from, n * width);
  else std::memcpy(to, from, n * width);
}

}  // namespace fastgen::cpu
