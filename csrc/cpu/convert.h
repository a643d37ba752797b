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

// A stream of bfloat16 that reads as float.
struct Brain {
  const uint16_t* data;

  FASTGEN_HD float operator[](int64_t i) const { return bfloat16_to_float(data[i]); }
};

// Asks for n elements from i on. Nothing to do for float: whole pages of a stream pass at a time.
template <int n, class T>
FASTGEN_HD void prefetch(const T*, int64_t) {}
template <int n>
FASTGEN_HD void prefetch(const Brain& in, int64_t i) {
  for (int l = 0; l < n; l += 32) __builtin_prefetch(in.data + i + l);
}

// Converts n elements, asking meanwhile for the lines kAhead elements on: where streams take turns, the hardware's
// prefetchers lose track.
template <int64_t kAhead, class T, class From, class Convert>
FASTGEN_HD void convert(const From* from, int64_t n, T* to, const Convert& element) {
  constexpr int64_t kLine = 64 / sizeof(From);
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    if constexpr (kAhead > 0) __builtin_prefetch(from + i + kAhead);
    for (int64_t j = i; j < i + kLine; ++j) to[j] = static_cast<T>(element(from[j]));
  }
  for (; i < n; ++i) to[i] = static_cast<T>(element(from[i]));
}

// n elements from `data` + offset as T: in place where the dtype is T's own, else converted into `buffer`. kAhead: how
// many elements on the next call is, or 0.
template <int64_t kAhead, class T>
FASTGEN_HD const T* load(const void* data, ScalarType dtype, int64_t offset, int64_t n, T* buffer) {
  if (dtype == dtype_of<T>()) return static_cast<const T*>(data) + offset;
  switch (dtype) {
    case ScalarType::Float:
      convert<kAhead>(static_cast<const float*>(data) + offset, n, buffer, [](float v) { return v; });
      break;
    case ScalarType::BFloat16:
      convert<kAhead>(static_cast<const uint16_t*>(data) + offset, n, buffer, bfloat16_to_float);
      break;
    case ScalarType::Half:
      convert<kAhead>(static_cast<const uint16_t*>(data) + offset, n, buffer, float16_to_float);
      break;
    case ScalarType::Bool:
      convert<kAhead>(static_cast<const uint8_t*>(data) + offset, n, buffer, [](uint8_t v) { return v != 0; });
      break;
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
  const int64_t width = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  char* to = static_cast<char*>(data) + offset * width;
  alignas(64) char buffer[4096];
  void* converted = streaming ? buffer : to;
  if (dtype == ScalarType::BFloat16) {
    uint16_t* out = static_cast<uint16_t*>(converted);
    for (int64_t i = 0; i < n; ++i) out[i] = float_to_bfloat16(static_cast<float>(values[i]));
  } else if (dtype == ScalarType::Half) {
    uint16_t* out = static_cast<uint16_t*>(converted);
    for (int64_t i = 0; i < n; ++i) out[i] = float_to_float16(static_cast<float>(values[i]));
  } else if (dtype != dtype_of<T>()) {
    float* out = static_cast<float*>(converted);
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(values[i]);
  } else if (streaming) {
    return stream_bytes(to, values, n * width);
  } else {
    std::memcpy(to, values, n * width);
    return;
  }
  if (streaming) stream_bytes(to, buffer, n * width);
}

}  // namespace fastgen::cpu
