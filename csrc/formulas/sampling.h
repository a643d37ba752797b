// Reverse diffusion steps: what a sampler does to an element between two calls of its network.
#pragma once

#include "score_distillation.h"  // Prediction, Mixture, guided

namespace fastgen {

// A number for each row, or (stride 0) one for all, or none: 0.
template <class T>
struct PerRow {
  const T* data;
  int64_t stride;

  FASTGEN_HD T operator[](int64_t row) const { return data ? data[row * stride] : T(0); }
};

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

// x_s = x0 clamp(x̂0) + x_t x_t + eps ε̂ + noise z, x̂0 and ε̂ from the guided prediction (fastgen.StepCoefficients).
// Streams: x_t, cond, [uncond], [z].
template <class T, bool kUncond, bool kNoise>
struct ReverseStep {
  static constexpr int kStreams = 2 + kUncond + kNoise, kSums = 0, kMapStreams = kStreams;
  struct Row {
    Mixture<T> clean, rest;  // x̂0; x_t and ε̂, which is no less linear in x_t and the prediction
    T x0, noise, guidance;
  };
  PerRow<T> alpha_t, sigma_t, x0, x_t, eps, noise, guidance;
  Prediction type;
  T low, high;  // infinite where nothing is clamped

  FASTGEN_HD Row row(int64_t row, int64_t) const {
    const T alpha = alpha_t[row], sigma = sigma_t[row], k = eps[row];
    Mixture<T> rest{x_t[row], T(0)};
    if (k != T(0)) {  // without noise, sigma = 0, there is no ε̂
      const Mixture<T> e = eps_from(type, alpha, sigma);
      rest = {rest.a + k * e.a, k * e.b};
    }
    return {x0_from(type, alpha, sigma), rest, x0[row], kNoise ? noise[row] : T(0),
            kUncond ? guidance[row] : T(1)};
  }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row&, T) const { return T(0); }
  FASTGEN_HD T map(const Row& row, T, const T* v) const {
    const T pred = guided<kUncond>(v[1], row.guidance, v + 2);
    T clean = row.clean(v[0], pred);
    clean = clamped(clean, low, high);
    const T mean = row.x0 * clean + row.rest(v[0], pred);
    if constexpr (kNoise) return mean + row.noise * v[2 + kUncond];
    else return mean;
  }
};

// out = uncond + s_i (cond - uncond)
template <class T>
struct Guidance {
  static constexpr int kStreams = 2, kSums = 0, kMapStreams = 2;
  struct Row {
    T scale;
  };
  PerRow<T> scale;

  FASTGEN_HD Row row(int64_t row, int64_t) const { return {scale[row]}; }
  FASTGEN_HD T coefficient(int64_t, int64_t, const Row& row, T) const { return row.scale; }
  FASTGEN_HD T map(const Row&, T scale, const T* v) const { return guided<true>(v[0], scale, v + 1); }
};

}  // namespace fastgen
