// Tensors seen as rows: the host-side view that the CPU and the CUDA skeleton share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

namespace fastgen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One input: row i starts at data + i * row_stride (elements), and is dense.
struct Stream {
  const void* data;
  ScalarType dtype;
  int64_t row_stride;
};

// One output, rows packed; data is null where none is wanted.
struct Output {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
};
inline Output output_of(const Tensor& grad, bool wanted) {
  return {wanted ? grad.mutable_data_ptr() : nullptr, grad.scalar_type()};
}

// On the device of `like`. Calls the C shim: going through the dispatcher costs a microsecond more per tensor.
inline Tensor empty_strided(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType dtype) {
  const auto device = like.device();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())), device.index(), &handle));
  return Tensor(handle);
}

inline std::size_t element_bytes(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

inline Tensor made_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline int64_t row_size(const Tensor& t) {
  const auto sizes = t.sizes();
  int64_t size = 1;
  for (size_t d = 1; d < sizes.size(); ++d) size *= sizes[d];
  return size;
}

// The inner strides of `t` when each of its rows is one dense block of memory, in any order of dimensions
// (contiguous, channels_last, …); nothing otherwise. Dimensions of size 1 get the stride that packing gives them.
inline std::optional<std::vector<int64_t>> dense_row_strides(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t inner = static_cast<int64_t>(sizes.size()) - 1;
  std::vector<int64_t> order(inner);
  std::iota(order.begin(), order.end(), 1);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  std::vector<int64_t> packed(inner);
  int64_t expected = 1;
  // Size-1 dimensions carry arbitrary strides, so they are packed where they stand and never compared.
  for (int64_t k = inner - 1; k >= 0; --k) {
    const int64_t d = order[k];
    if (sizes[d] != 1 && strides[d] != expected) return std::nullopt;
    packed[d - 1] = expected;
    expected *= std::max<int64_t>(sizes[d], 1);
  }
  return packed;
}

inline bool same_layout(const Tensor& t, const std::vector<int64_t>& inner) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (size_t d = 1; d < sizes.size(); ++d)
    if (sizes[d] != 1 && strides[d] != inner[d - 1]) return false;
  return true;
}

// N tensors of one shape as rows. Where all of them share one dense row layout they are read in place; otherwise
// those that are not contiguous are copied once.
template <int N>
struct Rows {
  int64_t count, size;
  std::array<Stream, N> stream;
  std::vector<int64_t> out_strides;  // of an output: packed rows in the layout of the first tensor
  std::array<Tensor, N> tensors;     // keeps copies alive

  explicit Rows(const std::array<Tensor, N>& inputs) : tensors(inputs) {
    count = inputs[0].size(0);
    size = row_size(inputs[0]);
    auto inner = dense_row_strides(inputs[0]);
    const bool shared = inner && std::all_of(inputs.begin(), inputs.end(), [&](const Tensor& t) {
      return same_layout(t, *inner);
    });
    if (!shared) {
      for (auto& t : tensors) t = made_contiguous(t);
      inner = dense_row_strides(tensors[0]);
    }
    out_strides = {size};
    out_strides.insert(out_strides.end(), inner->begin(), inner->end());
    for (int s = 0; s < N; ++s) stream[s] = {tensors[s].const_data_ptr(), tensors[s].scalar_type(), tensors[s].stride(0)};
  }

  // float64 arithmetic as soon as one input is float64, else float32.
  ScalarType arithmetic() const {
    for (const auto& s : stream)
      if (s.dtype == ScalarType::Double) return ScalarType::Double;
    return ScalarType::Float;
  }

  // What PyTorch's promotion gives for the floating types that fastgen takes.
  ScalarType promoted() const {
    for (const auto& s : stream)
      if (s.dtype != stream[0].dtype) return arithmetic();
    return stream[0].dtype;
  }
};

// A vector of per-row scalars in the arithmetic type, contiguous; converts at most [B] numbers.
inline std::optional<Tensor> row_scalars(const std::optional<Tensor>& t, ScalarType dtype) {
  if (!t) return std::nullopt;
  return made_contiguous(t->scalar_type() == dtype ? *t : torch::stable::to(*t, dtype));
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// The bytes of a bool tensor. Any but 0 is true (a view of other data can hold them all): a C++ bool could not hold it.
inline const uint8_t* flag_bytes(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f with a value of the arithmetic type.
template <class F>
auto with_arithmetic(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Double) return f(double{});
  return f(float{});
}

inline Tensor new_scalar(const Tensor& like, ScalarType dtype) { return empty_strided(like, {}, {}, dtype); }

inline Tensor new_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  const int64_t stride = 1;
  return empty_strided(like, {&size, 1}, {&stride, 1}, dtype);
}

inline Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {std::max<int64_t>(columns, 1), 1};
  return empty_strided(like, {sizes, 2}, {strides, 2}, dtype);
}

// Calls f with a constant of the flag's value.
template <class F>
void with_flag(bool flag, const F& f) {
  if (flag) f(std::true_type{});
  else f(std::false_type{});
}

// The first N of the tensors that are there, in order.
template <int N>
std::array<Tensor, N> present(std::initializer_list<std::optional<Tensor>> tensors) {
  std::array<Tensor, N> out;
  int n = 0;
  for (const auto& t : tensors)
    if (t && n < N) out[n++] = *t;
  return out;
}

// float64 as soon as one of the streams that are there is, or an output's dtype `x`.
inline ScalarType arithmetic_of(std::initializer_list<std::optional<Tensor>> streams, ScalarType x) {
  for (const auto& t : streams)
    if (x == ScalarType::Double || (t && t->scalar_type() == ScalarType::Double)) return ScalarType::Double;
  return ScalarType::Float;
}

}  // namespace fastgen
