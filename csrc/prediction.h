// What networks predict, and what a prediction says of the clean data and of the noise.
#pragma once

#include "skeleton/formula.h"

namespace fastgen {

enum class Prediction : int { epsilon, sample, v_prediction, flow_prediction };

// a x_t + b pred, which is what every kind of prediction says of x0 and of the noise.
template <class T>
struct Mixture {
  T a, b;

  FASTGEN_HD T operator()(T x_t, T pred) const { return a * x_t + b * pred; }
};

template <class T>
FASTGEN_HD Mixture<T> x0_from(Prediction type, T alpha, T sigma) {
  switch (type) {
    case Prediction::epsilon: return {T(1) / alpha, -sigma / alpha};
    case Prediction::sample: return {T(0), T(1)};
    case Prediction::v_prediction: {
      const T norm = alpha * alpha + sigma * sigma;
      return {alpha / norm, -sigma / norm};
    }
    default: {  // of a flow, 1 - sigma = alpha, x_t - sigma pred to the bit
      const T total = alpha + sigma;
      return {T(1) / total, -sigma / total};
    }
  }
}

template <bool kUncond, class T>
FASTGEN_HD T guided(T cond, T scale, const T* uncond) {
  if constexpr (kUncond) return *uncond + scale * (cond - *uncond);
  else return cond;
}

// The noise that a prediction means.
template <class T>
FASTGEN_HD Mixture<T> eps_from(Prediction type, T alpha, T sigma) {
  switch (type) {
    case Prediction::epsilon: return {T(0), T(1)};
    case Prediction::sample: return {T(1) / sigma, -alpha / sigma};
    case Prediction::v_prediction: {
      const T norm = alpha * alpha + sigma * sigma;
      return {sigma / norm, alpha / norm};
    }
    default: {
      const T total = alpha + sigma;
      return {T(1) / total, alpha / total};
    }
  }
}

}  // namespace fastgen
