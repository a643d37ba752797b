// Exponentials and logarithms of probabilities, in plain arithmetic that compilers vectorise at any level.
//
// float: polynomials fitted here, errors against float64 over the whole domain (tests/test_sequence.py checks them):
// exp below 1.1 units in the last place, expm1 and log below 2. double: the C library's.
#pragma once

#include <cstring>

#include "formula.h"

namespace fastgen {

// e^x and e^x - 1.
template <class T>
struct Exponential {
  T value, minus_one;
};

// x at most slightly above 0. Below -87, where float turns subnormal, the value is 0.
FASTGEN_HD Exponential<float> exponential(float x) {
  const float t = x < -87.0f ? -87.0f : x;  // NaN stays
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const float shifted = t * 0x1.715476p+0f + 0x1.8p23f, n = shifted - 0x1.8p23f;
  const float r = (t - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;  // ln 2 in two parts: n times the first is exact
  const float q = ((((0x1.6d9908p-10f * r + 0x1.1227fep-7f) * r + 0x1.555486p-5f) * r + 0x1.5554bp-3f) * r + 0.5f);
  const float p = r + r * r * q;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, 4);
  return {x < -87.0f ? 0.0f : power + power * p, power * p + (power - 1.0f)};
}

FASTGEN_HD Exponential<double> exponential(double x) { return {std::exp(x), std::expm1(x)}; }

template <class T>
FASTGEN_HD T exp_of(T x) {
  return exponential(x).value;
}

// log u, given z = u - 1 as well, which says more of a u near 1; 0 < u <= 1.
FASTGEN_HD float log_of(float u, float z) {
  int32_t bits;
  std::memcpy(&bits, &u, 4);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // of u over sqrt(1/2)
  bits -= exponent * (1 << 23);
  float mantissa;
  std::memcpy(&mantissa, &bits, 4);
  const float f = exponent == 0 ? z : mantissa - 1.0f, e = static_cast<float>(exponent), f2 = f * f;
  const float p = ((((((-0x1.38b4ccp-4f * f + 0x1.055b46p-3f) * f - 0x1.0d8552p-3f) * f + 0x1.22da22p-3f) * f -
                     0x1.547244p-3f) * f + 0x1.99a008p-3f) * f - 0x1.000228p-2f) * f + 0x1.555554p-2f;
  return e * 0x1.63p-1f + (f + (f * f2 * p - 0.5f * f2 - e * 0x1.bd0106p-13f));
}

FASTGEN_HD double log_of(double u, double z) { return u > 0.5 ? std::log1p(z) : std::log(u); }

}  // namespace fastgen
