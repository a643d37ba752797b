// Loads and stores of every dtype as float or double, in plain arithmetic that compilers vectorise at any level.
//
// The loops are compiled once, in convert.cpp: a call of one for each chunk of a row costs no time, and every formula
// would have its own copies of all dtypes' otherwise.
#pragma once

#include <type_traits>

#include "half.h"

namespace fastgen::cpu {

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
