// Reverse diffusion steps: what a sampler does to an element between two calls of its network.
#pragma once

#include "prediction.h"
#include "runtime/device.h"
#include "runtime/options.h"

namespace fastgen {

// A number for each row, or (stride 0) one for all, or none: 0.
template <class T>
struct PerRow {
  const T* data;
  int64_t stride;

  FASTGEN_HD T operator[](int64_t row) const { return data ? data[row * stride] : T(0); }
};

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

namespace sampling {

// Keeps a vector of numbers in the arithmetic type; of one element it is for all rows.
struct Scalars {
  std::optional<Tensor> vector;

  Scalars(const std::optional<Tensor>& t, ScalarType dtype) : vector(row_scalars(t, dtype)) {}

  template <class T>
  PerRow<T> view() const {
    return {data_or_null<T>(vector), !vector || vector->numel() == 1 ? 0 : 1};
  }
};

struct ReverseStepCall {
  const Tensor &x_t, &cond;
  const std::optional<Tensor>&uncond, &noise;
  const Tensor &alpha_t, &sigma_t, &k_x0, &k_x_t;
  const std::optional<Tensor>&k_eps, &k_noise, &guidance;
  int64_t type;
  double low, high;

  // Writes to `in_place`, or to an output of x_t's dtype that it returns.
  template <class Device>
  Tensor run(const Tensor* in_place) const {
    const auto arithmetic = arithmetic_of({cond, uncond, noise}, x_t.scalar_type());
    const Scalars alpha(alpha_t, arithmetic), sigma(sigma_t, arithmetic), x0(k_x0, arithmetic), x(k_x_t, arithmetic),
        eps(k_eps, arithmetic), z(k_noise, arithmetic), s(guidance, arithmetic);
    Tensor out;
    with_arithmetic(arithmetic, [&](auto zero) {
      with_flag(uncond.has_value(), [&](auto has_uncond) {
        with_flag(noise.has_value(), [&](auto has_noise) {
          using T = decltype(zero);
          using Formula = ReverseStep<T, has_uncond, has_noise>;
          const Rows<Formula::kStreams> rows(present<Formula::kStreams>({x_t, cond, uncond, noise}));
          if (in_place) {
            STD_TORCH_CHECK(rows.stream[0].data == x_t.const_data_ptr() &&
                                (rows.count <= 1 || rows.stream[0].row_stride == rows.size),
                            "reverse_step_: x_t must be packed, and the other tensors laid out like it");
          }
          out = in_place ? *in_place : Device::new_output(rows, x_t.scalar_type());
          const Formula formula{alpha.view<T>(), sigma.view<T>(), x0.view<T>(), x.view<T>(),
                                eps.view<T>(),   z.view<T>(),     s.view<T>(),  option<Prediction>(type),
                                T(low),          T(high)};
          Device::template rowwise<T>(formula, Groups::single(rows.count), rows,
                                      {out.mutable_data_ptr(), out.scalar_type()});
        });
      });
    });
    return out;
  }
};

}  // namespace sampling

template <class Device>
Tensor reverse_step(const Tensor& x_t, const Tensor& cond, const std::optional<Tensor>& uncond,
                    const std::optional<Tensor>& noise, const Tensor& alpha_t, const Tensor& sigma_t,
                    const Tensor& k_x0, const Tensor& k_x_t, const std::optional<Tensor>& k_eps,
                    const std::optional<Tensor>& k_noise, const std::optional<Tensor>& guidance,
                    int64_t type, double low, double high) {
  return sampling::ReverseStepCall{x_t,   cond,  uncond,  noise,    alpha_t, sigma_t, k_x0,
                                   k_x_t, k_eps, k_noise, guidance, type,    low,     high}
      .template run<Device>(nullptr);
}

template <class Device>
void reverse_step_(const Tensor& x_t, const Tensor& cond, const std::optional<Tensor>& uncond,
                   const std::optional<Tensor>& noise, const Tensor& alpha_t, const Tensor& sigma_t,
                   const Tensor& k_x0, const Tensor& k_x_t, const std::optional<Tensor>& k_eps,
                   const std::optional<Tensor>& k_noise, const std::optional<Tensor>& guidance,
                   int64_t type, double low, double high) {
  sampling::ReverseStepCall{x_t,   cond,  uncond,  noise,    alpha_t, sigma_t, k_x0,
                            k_x_t, k_eps, k_noise, guidance, type,    low,     high}
      .template run<Device>(&x_t);
}

template <class Device>
Tensor guidance(const Tensor& cond, const Tensor& uncond, const Tensor& scale) {
  const Rows<2> rows({cond, uncond});
  const auto arithmetic = rows.arithmetic(), dtype = rows.promoted();
  const sampling::Scalars s(scale, arithmetic);
  const Tensor out = Device::new_output(rows, dtype);
  with_arithmetic(arithmetic, [&](auto zero) {
    using T = decltype(zero);
    Device::template rowwise<T>(Guidance<T>{s.view<T>()}, Groups::single(rows.count), rows,
                                {out.mutable_data_ptr(), dtype});
  });
  return out;
}

template <class Device>
void register_sampling(torch::stable::detail::StableLibrary& m) {
  m.impl("guidance", TORCH_BOX(&guidance<Device>));
  m.impl("reverse_step", TORCH_BOX(&reverse_step<Device>));
  m.impl("reverse_step_", TORCH_BOX(&reverse_step_<Device>));
}

}  // namespace fastgen
