// Logits [..., V] seen as rows: the host-side view that the sweeps of the CPU and of CUDA share.
#pragma once

#include "rows.h"

namespace fastgen {

// One input: row i starts at element (i / inner) * outer_stride + (i % inner) * inner_stride, and is dense. Two leading
// strides take [B, T, V] sliced along T, or transposed, as it is.
struct TokenStream {
  const void* data;
  ScalarType dtype;
  int64_t inner, outer_stride, inner_stride;

  int64_t offset(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

// The leading dimensions of `t` as at most two strides; nothing where they are more, or where rows are not dense.
inline std::optional<TokenStream> token_stream(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
  if (t.numel() == 0) return TokenStream{t.const_data_ptr(), t.scalar_type(), 1, 0, 0};  // its strides mean nothing
  if (sizes[last] > 1 && strides[last] != 1) return std::nullopt;
  std::vector<std::array<int64_t, 2>> merged;  // {size, stride}, innermost first
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (!merged.empty() && strides[d] == merged.back()[0] * merged.back()[1]) merged.back()[0] *= sizes[d];
    else merged.push_back({sizes[d], strides[d]});
  }
  if (merged.size() > 2) return std::nullopt;
  const int64_t inner = merged.empty() ? 1 : merged[0][0];
  return TokenStream{t.const_data_ptr(), t.scalar_type(), inner, merged.size() == 2 ? merged[1][1] : 0,
                     merged.empty() ? 0 : merged[0][1]};
}

// N tensors of logits with the same rows; those that are no token stream are copied once.
template <int N>
struct TokenRows {
  int64_t count, size;  // size: the columns that all of them have
  std::array<TokenStream, N> stream;
  std::array<Tensor, N> tensors;

  explicit TokenRows(const std::array<Tensor, N>& inputs) : tensors(inputs) {
    count = 1;
    const auto sizes = inputs[0].sizes();
    for (size_t d = 0; d + 1 < sizes.size(); ++d) count *= sizes[d];
    size = inputs[0].size(-1);
    for (int s = 0; s < N; ++s) {
      size = std::min(size, inputs[s].size(-1));
      auto found = token_stream(inputs[s]);
      if (!found) {
        tensors[s] = torch::stable::contiguous(inputs[s]);
        found = token_stream(tensors[s]);
      }
      stream[s] = *found;
    }
  }

  ScalarType arithmetic() const {
    for (const auto& s : stream)
      if (s.dtype == ScalarType::Double) return ScalarType::Double;
    return ScalarType::Float;
  }
};

inline std::vector<int64_t> contiguous_strides(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

// Of the shape that comes before the last dimension of `logits`, with `first` in front if given.
inline Tensor new_per_row(const Tensor& logits, ScalarType dtype, std::optional<int64_t> first = std::nullopt) {
  const auto sizes = logits.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end() - 1);
  if (first) shape.insert(shape.begin(), *first);
  return empty_strided(logits, shape, contiguous_strides(shape), dtype);
}

}  // namespace fastgen
