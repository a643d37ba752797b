// Tensors in memory of the pool.
#pragma once

#include "pool.h"
#include "rows.h"

namespace fastgen::cpu {

// Large ones are of the pool, others of PyTorch's allocator.
inline Tensor pooled(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                     torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType dtype) {
  std::size_t elements = 1;
  for (const int64_t size : sizes) elements *= static_cast<std::size_t>(size);
  const std::size_t bytes = elements * element_bytes(dtype);
  // An expanded tensor can have so many elements that their bytes overflow: torch then raises.
  if (bytes < kPooledBytes || bytes < elements) return empty_strided(like, sizes, strides, dtype);
  return torch::stable::from_blob(take_block(bytes), sizes, strides, like.device(), dtype, &give_block);
}

}  // namespace fastgen::cpu
