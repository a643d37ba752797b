#include "pool.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgen::cpu {

namespace {

constexpr std::size_t kPage = 64 << 10;  // the largest in use
constexpr std::size_t kHugePage = 2 << 20;

std::size_t alignment_of(std::size_t bytes) { return bytes < kHugePage ? kPage : kHugePage; }

// From this size on a block is offered to the system while it is free: the call takes 50 µs for 2 MiB.
constexpr std::size_t kOffered = 32 << 20;

void advise_taken([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
  // One fault for 2 MiB instead of 512.
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
}

void advise_free([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
  if (bytes >= kOffered) madvise(data, bytes, MADV_FREE);
#endif
}

struct Pool {
  std::mutex mutex;
  std::unordered_map<void*, std::size_t> sizes;  // of every block, in use or free
  std::vector<void*> free_blocks;                // the most recently freed last
  std::size_t free_bytes = 0, limit;

  Pool() {
    const char* megabytes = std::getenv("FASTGEN_CPU_CACHE_MB");
    limit = (megabytes ? std::strtoull(megabytes, nullptr, 10) : 512) << 20;
  }

  // A free block that wastes at most an eighth, or null.
  void* reuse(std::size_t bytes) {
    for (std::size_t i = free_blocks.size(); i-- > 0;) {
      void* data = free_blocks[i];
      const std::size_t size = sizes[data];
      if (size < bytes || size - bytes > bytes / 8) continue;
      free_blocks.erase(free_blocks.begin() + static_cast<std::ptrdiff_t>(i));
      free_bytes -= size;
      return data;
    }
    return nullptr;
  }
};

// Never destroyed: tensors can outlive static objects.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

void* take_block(std::size_t bytes) {
  const std::size_t alignment = alignment_of(bytes);
  bytes = (bytes + alignment - 1) / alignment * alignment;
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  if (void* data = p.reuse(bytes)) return data;
  void* data = std::aligned_alloc(alignment, bytes);
  if (data == nullptr) throw std::bad_alloc();
  advise_taken(data, bytes);
  p.sizes[data] = bytes;
  return data;
}

void give_block(void* data) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const std::size_t bytes = p.sizes[data];
  p.free_blocks.push_back(data);
  p.free_bytes += bytes;
  advise_free(data, bytes);
  while (p.free_bytes > p.limit) {  // the longest unused go first
    void* oldest = p.free_blocks.front();
    p.free_blocks.erase(p.free_blocks.begin());
    p.free_bytes -= p.sizes[oldest];
    p.sizes.erase(oldest);
    std::free(oldest);
  }
}

}  // namespace fastgen::cpu
