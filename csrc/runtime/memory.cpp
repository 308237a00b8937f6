#include "pyllmlite/memory.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#include <sys/mman.h>
#define PLL_HUGE_PAGES 1
#endif

namespace pyllmlite {
namespace {

constexpr size_t kAlignment = 64;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

std::shared_ptr<void> from_heap(size_t bytes) {
  void* p = std::aligned_alloc(kAlignment, bytes);
  if (p == nullptr) throw std::bad_alloc();
  std::memset(p, 0, bytes);
  return {p, std::free};
}

#ifdef PLL_HUGE_PAGES
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kChunk = size_t(32) << 20;
constexpr size_t kSmall = size_t(32) << 10;  // stays on the heap

// A mapping of its own, from the first huge page's edge on.
std::shared_ptr<void> map(size_t bytes) {
  const size_t size = round_up(bytes, kHugePage) + kHugePage;
  void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  const size_t skip = (kHugePage - reinterpret_cast<size_t>(base) % kHugePage) % kHugePage;
  char* start = static_cast<char*>(base) + skip;
  madvise(start, size - kHugePage, MADV_HUGEPAGE);  // without it: small pages, slower
  return {start, [base, size](void*) { munmap(base, size); }};
}

// The chunk that pieces are cut from.
struct Arena {
  std::mutex mutex;
  std::shared_ptr<void> chunk;
  size_t used = kChunk;
};

std::shared_ptr<void> from_arena(size_t bytes) {
  static Arena* arena = new Arena;  // pieces may outlive static objects
  const std::lock_guard<std::mutex> lock(arena->mutex);
  if (arena->used + bytes > kChunk) {
    arena->chunk = map(kChunk);
    arena->used = 0;
  }
  char* piece = static_cast<char*>(arena->chunk.get()) + arena->used;
  arena->used += bytes;
  return {arena->chunk, piece};
}
#endif

}  // namespace

std::shared_ptr<void> allocate_zeroed(size_t bytes) {
  bytes = round_up(bytes < kAlignment ? kAlignment : bytes, kAlignment);
#ifdef PLL_HUGE_PAGES
  if (bytes >= kChunk / 2) return map(bytes);
  if (bytes >= kSmall) return from_arena(bytes);
#endif
  return from_heap(bytes);
}

}  // namespace pyllmlite
