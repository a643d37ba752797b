// Memory for large outputs, kept from one call to the next.
#pragma once

#include <cstddef>

namespace fastgen::cpu {

// A fresh allocation of this size comes from the kernel in zeroed pages, which costs more than computing what goes
// into it; a training step asks for the same size every time. Blocks that a tensor gives back are kept, up to
// FASTGEN_CPU_CACHE_MB (default 512; 0 turns this off); the large ones are offered to the system, which takes their
// pages if it runs short of memory (MADV_FREE).
constexpr std::size_t kPooledBytes = 256 << 10;

void* take_block(std::size_t bytes);
void give_block(void* data);

}  // namespace fastgen::cpu
