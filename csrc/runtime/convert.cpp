#include "convert.h"

#include "isa.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace fastgen::cpu {

namespace {

template <class T>
struct Loading {
  static constexpr bool kBaselineOnly = std::is_same_v<T, double>;  // as the formulas' own loops
  const void* data;
  ScalarType dtype;
  int64_t offset, n;
  T* to;
};

template <class T, class From, class Convert>
FASTGEN_HD void convert(const Loading<T>& job, const Convert& element) {
  constexpr int64_t kLine = 64 / sizeof(From);
  const From* from = static_cast<const From*>(job.data) + job.offset;
  const int64_t n = job.n;
  T* to = job.to;
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    __builtin_prefetch(from + i + kChunk);
    for (int64_t j = i; j < i + kLine; ++j) to[j] = static_cast<T>(element(from[j]));
  }
  for (; i < n; ++i) to[i] = static_cast<T>(element(from[i]));
}

struct Load {
  template <class T>
  static FASTGEN_HD void run(const Loading<T>& job) {
    switch (job.dtype) {
      case ScalarType::Float: return convert<T, float>(job, [](float v) { return v; });
      case ScalarType::BFloat16: return convert<T, uint16_t>(job, bfloat16_to_float);
      case ScalarType::Half: return convert<T, uint16_t>(job, float16_to_float);
      case ScalarType::Bool: return convert<T, uint8_t>(job, [](uint8_t v) { return v != 0; });
      default: return;  // float64 into float does not occur: one float64 input makes the arithmetic float64
    }
  }
};

template <class T>
struct Storing {
  static constexpr bool kBaselineOnly = std::is_same_v<T, double>;
  const T* values;
  ScalarType dtype;
  int64_t n;
  void* to;
};

struct Store {
  template <class T>
  static FASTGEN_HD void run(const Storing<T>& job) {
    const T* values = job.values;
    const int64_t n = job.n;
    if (job.dtype == ScalarType::BFloat16) {
      uint16_t* out = static_cast<uint16_t*>(job.to);
      for (int64_t i = 0; i < n; ++i) out[i] = float_to_bfloat16(static_cast<float>(values[i]));
    } else if (job.dtype == ScalarType::Half) {
      uint16_t* out = static_cast<uint16_t*>(job.to);
      for (int64_t i = 0; i < n; ++i) out[i] = float_to_float16(static_cast<float>(values[i]));
    } else {
      float* out = static_cast<float*>(job.to);
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(values[i]);
    }
  }
};

// Copies past the cache: a large output is not read again soon, and a plain store would first fetch its lines.
void stream_bytes(void* to, const void* from, int64_t bytes) {
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

}  // namespace

template <class T>
void load_converted(const void* data, ScalarType dtype, int64_t offset, int64_t n, T* buffer) {
  run<Load>(Loading<T>{data, dtype, offset, n, buffer});
}

template <class T>
void store(void* data, ScalarType dtype, int64_t offset, int64_t n, const T* values, bool streaming) {
  const int64_t width = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  char* to = static_cast<char*>(data) + offset * width;
  if (dtype == dtype_of<T>()) {
    if (streaming) stream_bytes(to, values, n * width);
    else std::memcpy(to, values, n * width);
    return;
  }
  alignas(64) char buffer[kChunk * sizeof(float)];
  run<Store>(Storing<T>{values, dtype, n, streaming ? buffer : to});
  if (streaming) stream_bytes(to, buffer, n * width);
}

void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template void load_converted(const void*, ScalarType, int64_t, int64_t, float*);
template void load_converted(const void*, ScalarType, int64_t, int64_t, double*);
template void store(void*, ScalarType, int64_t, int64_t, const float*, bool);
template void store(void*, ScalarType, int64_t, int64_t, const double*, bool);

}  // namespace fastgen::cpu
