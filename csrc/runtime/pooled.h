// Tensors in memory of the pool.
#pragma once

#include "pool.h"
#include "rows.h"

namespace fastgen::cpu {

// Large ones are of the pool, others of PyTorch's allocator.
inline Tensor pooled(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                     torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType dtype) {
  std::size_t bytes = element_bytes(dtype);
  for (const int64_t size : sizes) bytes *= static_cast<std::size_t>(size);
  if (bytes < kPooledBytes) return empty_strided(like, sizes, strides, dtype);
  return torch::stable::from_blob(take_block(bytes), sizes, strides, like.device(), dtype, &give_block);
}

}  // namespace fastgen::cpu
