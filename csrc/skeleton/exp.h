// Exponentials and logarithms of probabilities, in plain arithmetic that compilers vectorise at any level.
//
// float: polynomials fitted here, errors against float64 over the whole domain (tests/test_sequence.py checks them):
// exp below 1.1 units in the last place, expm1 and log below 2. double: the C library's.
//
// What a sweep does with every logit is to the base of the device (Base): 2 on a GPU, whose hardware has 2^x (to a
// relative 2^-22) and log2 (there too, but between 1/2 and 2 to an absolute 2^-22), e on a CPU.
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

#if defined(__CUDACC__) || defined(FASTGEN_EMULATED)
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float hardware_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float hardware_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#elif defined(FASTGEN_EMULATED)
using emulator::hardware_exp2, emulator::hardware_log2;
#else
inline float hardware_exp2(float x) { return std::exp2(x); }  // never called: nvcc's own pass over host code
inline float hardware_log2(float x) { return std::log2(x); }
#endif

// log(u, z): of u = 1 + z, as far as the device can tell the two apart. scale: 1 / temperature to the base.
struct Base {
  static constexpr double kLog = 0.69314718055994530942;  // natural, of the base
  // Beyond ±most the smaller of two probabilities is nothing beside the larger, and base^±most is a normal number.
  template <class T>
  static constexpr T kMost = sizeof(T) == 4 ? 36 : 126;

  static FASTGEN_HD float power(float x) { return hardware_exp2(x); }
  static FASTGEN_HD double power(double x) { return std::exp2(x); }
  static FASTGEN_HD float log(float u, float) { return hardware_log2(u); }
  static FASTGEN_HD double log(double u, double) { return std::log2(u); }
  template <class T>
  static FASTGEN_HD T scale(T inverse_temperature) {
    return inverse_temperature * T(1 / kLog);
  }
};

// (v - max) * scale for every v of a row, as one rounded operation, v * scale - base: base is max * scale, rounded, and
// what that lost is a factor of the whole row. Where what it lost could be beyond any power, the next smaller logit is so
// far below the maximum that only what equals it counts; then a power of two stands for the scale, for nothing to be
// lost.
template <class T>
struct Origin {
  static constexpr T kExact = sizeof(T) == 4 ? T(0x1p31) : T(0x1p60);  // half its last place is 64
  T scale, base;
  bool beyond;

  Origin() = default;
  FASTGEN_HD Origin(T max, T scale_) : scale(scale_), base(max * scale_), beyond(false) {
    if (!(std::abs(base) < kExact)) {
      if (max == -static_cast<T>(INFINITY)) {
        base = T(-1e37);  // nothing yet
      } else {
        scale = power_of_two(scale);
        if (!(std::abs(base) < T(1e37))) scale *= T(0x1p-40);
        base = max * scale, beyond = true;
      }
    }
  }
  FASTGEN_HD T from(T v) const { return std::fma(v, scale, -base); }
  // base^(base - max * scale), near 1, to the last place: it is on every number of the row.
  FASTGEN_HD T factor(T max) const { return beyond ? T(1) : exp_of(-std::fma(max, scale, -base) * T(Base::kLog)); }
  // What a sum is times that had `other` as its base.
  FASTGEN_HD T carries(T other, bool same_max) const { return beyond ? T(same_max) : Base::power(other - base); }

  // The largest that is at most x.
  static FASTGEN_HD float power_of_two(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits &= 0x7f800000u;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static FASTGEN_HD double power_of_two(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    bits &= 0x7ff0000000000000u;
    std::memcpy(&x, &bits, 8);
    return x;
  }
};
#else
struct Base {
  static constexpr double kLog = 1;
  template <class T>
  static constexpr T kMost = sizeof(T) == 4 ? 25 : 87;

  static FASTGEN_HD float power(float x) { return exp_of(x); }
  static FASTGEN_HD double power(double x) { return std::exp(x); }
  static FASTGEN_HD float log(float u, float z) { return log_of(u, z); }
  static FASTGEN_HD double log(double u, double) { return std::log(u); }
  template <class T>
  static FASTGEN_HD T scale(T inverse_temperature) {
    return inverse_temperature;
  }
};

template <class T>
struct Origin {
  T scale, base;

  FASTGEN_HD Origin(T max, T scale_) : scale(scale_), base(max) {}
  FASTGEN_HD T from(T v) const { return (v - base) * scale; }  // not fused: not every CPU can
  FASTGEN_HD T factor(T) const { return T(1); }
};
#endif

// The larger and the smaller number; of NaN and a number, the number `limit`.
FASTGEN_HD float at_least(float x, float limit) {
#ifdef __CUDA_ARCH__
  return fmaxf(x, limit);
#else
  return x > limit ? x : limit;
#endif
}
FASTGEN_HD float at_most(float x, float limit) {
#ifdef __CUDA_ARCH__
  return fminf(x, limit);
#else
  return x < limit ? x : limit;
#endif
}
FASTGEN_HD double at_least(double x, double limit) { return x > limit ? x : limit; }
FASTGEN_HD double at_most(double x, double limit) { return x < limit ? x : limit; }

// How far from 0 the two series below are used, in natural units; elsewhere nothing cancels.
constexpr float kNear = 0.175f;

// e^x - 1 for |x| <= kNear, to 1 unit in the last place.
FASTGEN_HD float expm1_near(float x) {
  const float p = ((0x1.11664cp-7f * x + 0x1.55c5bap-5f) * x + 0x1.555544p-3f) * x + 0x1.ffffe4p-2f;
  return x * (x * p + 1.0f);
}
FASTGEN_HD double expm1_near(double x) { return std::expm1(x); }

// log(rest + beta base^d) to the base, with rest = 1 - beta: what M = beta P + (1 - beta) Q is over Q, for
// P = Q base^d. Near 0 by its series in d, whose coefficients are the cumulants of a coin that shows 1 with probability
// beta, over factorials; they converge for |d| < π.
template <class T>
struct LogMixture {
  static constexpr int kTerms = 5;
  T beta, rest;  // rest: 1 - beta, which float would round
  T terms[kTerms];

  explicit LogMixture(double probability) : beta(static_cast<T>(probability)), rest(static_cast<T>(1 - probability)) {
    double mean[kTerms] = {probability};  // the series of β e^u / (rest + β e^u), whose integral is the logarithm: p' = p (1 - p)
    double power = 1;
    for (int n = 0; n < kTerms; ++n) {
      terms[n] = static_cast<T>(mean[n] / (n + 1) * power);
      power *= Base::kLog;
      if (n + 1 == kTerms) break;
      mean[n + 1] = mean[n];
      for (int i = 0; i <= n; ++i) mean[n + 1] -= mean[i] * mean[n - i];
      mean[n + 1] /= n + 1;
    }
  }

  FASTGEN_HD float log(float d) const {
    float near = terms[kTerms - 1];
    for (int n = kTerms - 2; n >= 0; --n) near = near * d + terms[n];
    const float power = Base::power(d), far = Base::log(beta * power + rest, beta * (power - 1.0f));
    return std::abs(d) < static_cast<float>(kNear / Base::kLog) ? near * d : far;
  }
  FASTGEN_HD double log(double d) const {
    return d < 1 ? std::log1p(beta * std::expm1(d * Base::kLog)) / Base::kLog : Base::log(beta * Base::power(d) + rest, 0);
  }
};

}  // namespace fastgen
