#pragma once

#include "runtime/half.h"
#include "emulator.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  uint16_t x, y;
};
struct __nv_bfloat162 {
  uint16_t x, y;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half h) { return fastgen::float16_to_float(h.bits); }
inline __half2 __floats2half2_rn(float a, float b) {
  return {fastgen::float_to_float16(a), fastgen::float_to_float16(b)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {fastgen::float_to_bfloat16(a), fastgen::float_to_bfloat16(b)};
}
