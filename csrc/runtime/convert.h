// Loads and stores of every dtype as float or double, in plain arithmetic that compilers vectorise at any level.
//
// The loops are compiled once, in convert.cpp: a call of one for each chunk of a row costs no time, and every formula
// would have its own copies of all dtypes' otherwise.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../skeleton/formula.h"

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

constexpr int64_t kChunk = 1024;  // elements converted and summed at a time: streams stay in L1

// n elements from `data` + offset, of another dtype than T's own, into `buffer`. Asks meanwhile for the kChunk elements
// that follow: where streams take turns, the hardware's prefetchers lose track.
template <class T>
void load_converted(const void* data, ScalarType dtype, int64_t offset, int64_t n, T* buffer);

// n <= kChunk elements of T to `data` + offset in `dtype`; past the cache if `streaming`.
template <class T>
void store(void* data, ScalarType dtype, int64_t offset, int64_t n, const T* values, bool streaming);

// After the last store past the cache.
void stream_fence();

// n elements from `data` + offset as T: in place where the dtype is T's own, else converted into `buffer`.
template <class T>
FASTGEN_HD const T* load(const void* data, ScalarType dtype, int64_t offset, int64_t n, T* buffer) {
  if (dtype == dtype_of<T>()) return static_cast<const T*>(data) + offset;
  load_converted<T>(data, dtype, offset, n, buffer);
  return buffer;
}

}  // namespace fastgen::cpu
