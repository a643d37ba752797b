// Vectors of kWidth elements in registers: loads and stores of every dtype, 16 bytes at a time where rows allow.
//
// A loaded vector stays in its own dtype until it is used. All streams' loads are then issued before the first
// conversion waits for one, and shared memory holds two bytes, not four, of a bfloat16 element. The dtype is a run-time
// switch, the same for a whole launch: it costs a few uniform branches per vector where the memory has time for
// hundreds of instructions, while templates on three streams' dtypes would multiply every kernel by up to 27.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "rows.h"
#include "partition.h"

namespace fastgen::cuda {

struct Raw {
  uint32_t word[8];
};

// Kernels know of bool where `masks`: the branches cost registers.
template <bool masks = true>
__host__ __device__ __forceinline__ int bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Double          ? 8
         : dtype == ScalarType::Float         ? 4
         : masks && dtype == ScalarType::Bool ? 1
                                              : 2;
}

// Whether a load is the last of its data in this operator. The last leaves the cache first (ld.cs), and is never
// ld.nc: an operator may write where it has read.
enum class Use { last, again };

template <Use use, class V>
__device__ __forceinline__ V load_global(const void* p) {
  if constexpr (use == Use::last) return __ldcs(static_cast<const V*>(p));
  else return *static_cast<const V*>(p);
}

__device__ __forceinline__ void put(Raw& raw, int word, uint4 v) {
  raw.word[word] = v.x, raw.word[word + 1] = v.y, raw.word[word + 2] = v.z, raw.word[word + 3] = v.w;
}
__device__ __forceinline__ uint4 get(const Raw& raw, int word) {
  return {raw.word[word], raw.word[word + 1], raw.word[word + 2], raw.word[word + 3]};
}

template <class T, Use use, bool masks>
__device__ __forceinline__ void load_wide(const Stream& in, int64_t element, Raw& raw) {
  const int bytes = bytes_of<masks>(in.dtype);
  const char* p = static_cast<const char*>(in.data) + element * bytes;
  if (masks && kWidth<T> == 4 && bytes == 1) {
    raw.word[0] = load_global<use, uint32_t>(p);
    return;
  }
  if ((masks || kWidth<T> == 4) && bytes * kWidth<T> == 8) {
    const uint2 v = load_global<use, uint2>(p);
    raw.word[0] = v.x, raw.word[1] = v.y;
    return;
  }
  put(raw, 0, load_global<use, uint4>(p));
  if (bytes == static_cast<int>(sizeof(T))) put(raw, 4, load_global<use, uint4>(p + 16));
}

template <class T, Use use, bool masks>
__device__ __forceinline__ void load_single(const Stream& in, int64_t row_start, const Span& span, Raw& raw) {
  const int64_t element = row_start + span.start;
#pragma unroll
  for (int w = 0; w < 8; ++w) raw.word[w] = 0;
  if (in.dtype == ScalarType::Double) {
    const uint2* p = static_cast<const uint2*>(in.data) + element;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < span.count) {
        const uint2 v = load_global<use, uint2>(p + j * span.stride);
        raw.word[2 * j] = v.x, raw.word[2 * j + 1] = v.y;
      }
  } else if (in.dtype == ScalarType::Float) {
    const uint32_t* p = static_cast<const uint32_t*>(in.data) + element;
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j)
      if (j < span.count) raw.word[j] = load_global<use, uint32_t>(p + j * span.stride);
  } else if (masks && in.dtype == ScalarType::Bool) {
    const uint8_t* p = static_cast<const uint8_t*>(in.data) + element;
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j)
      if (j < span.count)
        raw.word[j / 4] |= static_cast<uint32_t>(load_global<use, uint8_t>(p + j * span.stride)) << (8 * (j % 4));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(in.data) + element;
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j)
      if (j < span.count)
        raw.word[j / 2] |= static_cast<uint32_t>(load_global<use, uint16_t>(p + j * span.stride)) << (16 * (j % 2));
  }
}

// One branch on the dtype per vector, not per element.
template <class T, bool masks>
__device__ __forceinline__ void unpack(const Raw& raw, ScalarType dtype, T (&x)[kWidth<T>]) {
  if (sizeof(T) == 8 && dtype == ScalarType::Double) {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = static_cast<T>(__hiloint2double(raw.word[2 * j + 1], raw.word[2 * j]));
  } else if (dtype == ScalarType::Float) {
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) x[j] = __uint_as_float(raw.word[j]);
  } else if (masks && dtype == ScalarType::Bool) {
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) x[j] = raw.word[j / 4] & (0xffu << (8 * (j % 4))) ? T(1) : T(0);
  } else if (dtype == ScalarType::BFloat16) {
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j)
      x[j] = __uint_as_float(j % 2 ? raw.word[j / 2] & 0xffff0000u : raw.word[j / 2] << 16);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j)
      x[j] = __half2float(__ushort_as_half(static_cast<unsigned short>(raw.word[j / 2] >> (16 * (j % 2)))));
  }
}

__device__ __forceinline__ uint32_t bits_of(__nv_bfloat162 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }
__device__ __forceinline__ uint32_t bits_of(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

// Rounds to nearest; a double becomes a half through float, as in PyTorch's conversions.
template <class T>
__device__ __forceinline__ Raw pack(const T (&x)[kWidth<T>], ScalarType dtype) {
  Raw raw;
  if (sizeof(T) == 8 && dtype == ScalarType::Double) {
#pragma unroll
    for (int j = 0; j < 4; ++j) raw.word[2 * j] = __double2loint(x[j]), raw.word[2 * j + 1] = __double2hiint(x[j]);
  } else if (dtype == ScalarType::Float) {
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) raw.word[j] = __float_as_uint(static_cast<float>(x[j]));
  } else if (dtype == ScalarType::BFloat16) {
#pragma unroll
    for (int j = 0; j < kWidth<T>; j += 2)
      raw.word[j / 2] = bits_of(__floats2bfloat162_rn(static_cast<float>(x[j]), static_cast<float>(x[j + 1])));
  } else {
#pragma unroll
    for (int j = 0; j < kWidth<T>; j += 2)
      raw.word[j / 2] = bits_of(__floats2half2_rn(static_cast<float>(x[j]), static_cast<float>(x[j + 1])));
  }
  return raw;
}

template <class T>
__device__ __forceinline__ void store_wide(const Output& out, int64_t element, const Raw& raw) {
  const int bytes = bytes_of<false>(out.dtype);
  char* p = static_cast<char*>(out.data) + element * bytes;
  if (kWidth<T> == 4 && bytes == 2) {
    __stcs(reinterpret_cast<uint2*>(p), make_uint2(raw.word[0], raw.word[1]));
    return;
  }
  __stcs(reinterpret_cast<uint4*>(p), get(raw, 0));
  if (bytes == static_cast<int>(sizeof(T))) __stcs(reinterpret_cast<uint4*>(p + 16), get(raw, 4));
}

template <class T>
__device__ __forceinline__ void store_single(const Output& out, int64_t row_start, const Span& span,
                                                const Raw& raw) {
  const int64_t element = row_start + span.start;
#pragma unroll
  for (int j = 0; j < kWidth<T>; ++j)
    if (j < span.count) {
      const int64_t at = element + j * span.stride;
      if (out.dtype == ScalarType::Float) static_cast<uint32_t*>(out.data)[at] = raw.word[j];
      else if (bytes_of<false>(out.dtype) == 2)
        static_cast<uint16_t*>(out.data)[at] = static_cast<uint16_t>(raw.word[j / 2] >> (16 * (j % 2)));
      else if constexpr (sizeof(T) == 8)
        static_cast<uint2*>(out.data)[at] = make_uint2(raw.word[2 * j], raw.word[2 * j + 1]);
    }
}

// A block's shared memory for the map streams of its vectors. Every thread reads only what it wrote itself, so no
// barrier orders the two; a warp's 16-byte pieces are neighbours, so there are no bank conflicts.
template <class T, bool masks>
struct Held {
  char* base;   // of one stream
  int threads;  // in the block
  int thread;

  __device__ __forceinline__ uint4* piece(int slot, int pieces, int k) const {
    return reinterpret_cast<uint4*>(base) + (slot * pieces + k) * threads + thread;
  }
  __device__ __forceinline__ void store(int slot, ScalarType dtype, const Raw& raw) const {
    const int bytes = bytes_of<masks>(dtype) * kWidth<T>;
    if (masks && bytes == 4) reinterpret_cast<uint32_t*>(base)[slot * threads + thread] = raw.word[0];
    else if (bytes == 8) reinterpret_cast<uint2*>(base)[slot * threads + thread] = make_uint2(raw.word[0], raw.word[1]);
    else {
      *piece(slot, bytes / 16, 0) = get(raw, 0);
      if (bytes == 32) *piece(slot, 2, 1) = get(raw, 4);
    }
  }
  __device__ __forceinline__ void load(int slot, ScalarType dtype, Raw& raw) const {
    const int bytes = bytes_of<masks>(dtype) * kWidth<T>;
    if (masks && bytes == 4) raw.word[0] = reinterpret_cast<const uint32_t*>(base)[slot * threads + thread];
    else if (bytes == 8) {
      const uint2 v = reinterpret_cast<const uint2*>(base)[slot * threads + thread];
      raw.word[0] = v.x, raw.word[1] = v.y;
    } else {
      put(raw, 0, *piece(slot, bytes / 16, 0));
      if (bytes == 32) put(raw, 4, *piece(slot, 2, 1));
    }
  }
};

}  // namespace fastgen::cuda
