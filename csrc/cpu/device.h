// The CPU as csrc/operators/device.h describes a device.
#pragma once

#include "../operators/device.h"
#include "pool.h"
#include "rowwise.h"
#include "sweep.h"

namespace fastgen::cpu {

struct Device {
  template <class T, class F, int N>
  static void rowwise(const F& formula, const Groups& groups, const Rows<N>& rows, Output out = {}) {
    if constexpr (MayBeIdle<F>)
      if (formula.idle()) return;
    cpu::rowwise<T>(formula, groups, rows, out);
  }

  template <int N>
  static Tensor new_output(const Rows<N>& rows, ScalarType dtype) {
    return pooled(rows.tensors[0], rows.out_strides, dtype);
  }

  static Tensor new_logits(const Tensor& logits) {
    return pooled(logits, contiguous_strides(logits.sizes()), logits.scalar_type());
  }

  // Of the shape of `like`; large ones from the pool.
  static Tensor pooled(const Tensor& like, const std::vector<int64_t>& strides, ScalarType dtype) {
    const auto elements = static_cast<std::size_t>(like.numel()), bytes = elements * element_bytes(dtype);
    // An expanded tensor can have so many elements that their bytes overflow: torch then raises.
    if (bytes < kPooledBytes || bytes < elements) return empty_strided(like, like.sizes(), strides, dtype);
    return torch::stable::from_blob(take_block(bytes), like.sizes(), strides, like.device(), dtype, &give_block);
  }

  template <class T, class F, int N>
  static void sweep(const F& formula, const TokenRows<N>& rows, Output out, int64_t width) {
    cpu::sweep<T>(formula, rows, out, width);
  }

  template <class T>
  static Tensor sum(const Tensor& terms) {
    const T* data = static_cast<const T*>(terms.const_data_ptr());
    double total = 0;
    for (int64_t i = 0; i < terms.numel(); ++i) total += static_cast<double>(data[i]);
    const Tensor out = new_scalar(terms, terms.scalar_type());
    *mutable_data<T>(out) = static_cast<T>(total);
    return out;
  }

  template <class T>
  struct FlagCounts {
    T counts[2];

    explicit FlagCounts(const Tensor& flags) {
      const uint8_t* data = flag_bytes(flags);
      int64_t set = 0;
      for (int64_t i = 0; i < flags.numel(); ++i) set += data[i] != 0;
      counts[0] = static_cast<T>(set);
      counts[1] = static_cast<T>(flags.numel() - set);
    }
    const T* data() const { return counts; }
  };
};

}  // namespace fastgen::cpu
