#include "pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <system_error>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastops {
namespace {

constexpr size_t kMinimum =
    size_t{128} << 10;  // from where malloc too takes pages from the system and gives them back
constexpr size_t kAlignment =
    size_t{2} << 20;  // of a huge page: one fault instead of 512, where the system has them

struct Block {
  void* data;
  size_t size;
};

// Sizes are rounded up to an eighth of a power of two, so that a block fits the next result of
// about its size.
size_t rounded(size_t n) {
  const size_t step = std::max(std::bit_floor(n) / 8, size_t{16} << 10);
  return (n + step - 1) / step * step;
}

void* system_allocate(size_t size) {
#if defined(__linux__)
  if (size < kAlignment) {
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
  }
  // Aligned by asking for more and giving back both ends.
  const size_t span = size + kAlignment;
  void* raw = mmap(nullptr, span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = (begin + kAlignment - 1) / kAlignment * kAlignment;
  if (aligned > begin) munmap(raw, aligned - begin);
  if (begin + span > aligned + size)
    munmap(reinterpret_cast<void*>(aligned + size), begin + span - aligned - size);
  madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);
  return reinterpret_cast<void*>(aligned);
#else
  return std::aligned_alloc(64, (size + 63) / 64 * 64);
#endif
}

void system_free(const Block& b) {
#if defined(__linux__)
  munmap(b.data, b.size);
#else
  std::free(b.data);
#endif
}

class Pool final : public c10::Allocator {
 public:
  static Pool& get() {
    static Pool* pool = new Pool();  // never destroyed: tensors may outlive static destruction
    return *pool;
  }

  c10::DataPtr allocate(size_t n) override {
    if (!serves(n)) return c10::GetDefaultCPUAllocator()->allocate(n);
    auto* block = new Block(take(rounded(n)));
    return {block->data, block, &Pool::release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }

  bool serves(size_t n) const { return n >= kMinimum && enabled_.load(std::memory_order_relaxed); }

  PoolInfo info() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {limit_, cached_, in_use_, hits_, misses_, enabled_.load()};
  }
  void set_limit(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    shrink(limit_);
  }
  void trim() {
    std::lock_guard<std::mutex> lock(mutex_);
    shrink(0);
  }
  void enable(bool on) {
    std::lock_guard<std::mutex> lock(mutex_);
    enabled_ = on;
    if (!on) shrink(0);
  }

 private:
  Pool() {
    size_t memory = size_t{8} << 30;
#if defined(__linux__)
    memory =
        static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
#endif
    limit_ = memory / 8;
    if (const char* text = std::getenv("FASTOPS_CPU_POOL_LIMIT")) {
      size_t bytes = 0;
      const char* const end = text + std::strlen(text);
      const auto [stop, error] =
          std::from_chars(text, end, bytes);  // unlike strtoull, takes no sign
      TORCH_CHECK(error == std::errc() && stop == end,
                  "FASTOPS_CPU_POOL_LIMIT must be a number of bytes, got '", text, "'");
      limit_ = bytes;
      enabled_ = bytes > 0;
    }
#if defined(__linux__)
    // A fork may happen while another thread holds the lock; the child would wait for it for ever.
    // Last: the handlers must not meet a pool that failed to be made.
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); },
                   [] { get().mutex_.unlock(); });
#endif
  }

  Block take(size_t size) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (auto found = idle_.find(size); found != idle_.end()) {
        const auto newest = std::prev(found->second.end());  // most likely still in cache
        const Block block = **newest;
        by_age_.erase(*newest);
        found->second.erase(newest);
        if (found->second.empty()) idle_.erase(found);
        cached_ -= size;
        in_use_ += size;
        ++hits_;
        return block;
      }
      ++misses_;
    }
    void* data = system_allocate(size);
    if (data == nullptr) {
      trim();
      data = system_allocate(size);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr,
                     "fastops: not enough memory: you tried to allocate ", size, " bytes");
    std::lock_guard<std::mutex> lock(mutex_);
    in_use_ += size;
    return {data, size};
  }

  void give_back(const Block& block) {
    std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= block.size;
    if (!enabled_ || block.size > limit_) {
      system_free(block);
      return;
    }
    by_age_.push_back(block);
    idle_[block.size].push_back(std::prev(by_age_.end()));
    cached_ += block.size;
    shrink(limit_);
  }

  // Gives idle blocks back, oldest first, until no more than `bytes` are left. The lock is held.
  void shrink(size_t bytes) {
    while (cached_ > bytes) {
      const auto oldest = by_age_.begin();
      const auto found = idle_.find(oldest->size);
      found->second.remove(oldest);
      if (found->second.empty()) idle_.erase(found);
      cached_ -= oldest->size;
      system_free(*oldest);
      by_age_.erase(oldest);
    }
  }

  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    get().give_back(*block);
    delete block;
  }

  std::mutex mutex_;
  std::list<Block> by_age_;
  std::map<size_t, std::list<std::list<Block>::iterator>> idle_;
  size_t limit_ = 0, cached_ = 0, in_use_ = 0, hits_ = 0, misses_ = 0;
  std::atomic<bool> enabled_{true};
};

}  // namespace

c10::Allocator* pool_allocator() { return &Pool::get(); }
bool pool_serves(size_t nbytes) { return nbytes >= kMinimum && Pool::get().serves(nbytes); }
PoolInfo pool_info() { return Pool::get().info(); }
void pool_set_limit(size_t bytes) { Pool::get().set_limit(bytes); }
void pool_trim() { Pool::get().trim(); }
void pool_enable(bool on) { Pool::get().enable(on); }

}  // namespace fastops
