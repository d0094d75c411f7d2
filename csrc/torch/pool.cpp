#include "pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <utility>

#include "memory_limit.h"

namespace fastops {
namespace {

// From here malloc too takes pages from the system and gives them back.
constexpr size_t kMinimum = size_t{128} << 10;
// Of a huge page: one fault instead of 512, where the system has them.
constexpr size_t kHugePage = size_t{2} << 20;
// Fewer pages are not worth a call to move them.
constexpr size_t kLeastMove = size_t{128} << 10;
// How much is handed out, at most, between two looks at what is left of the control group.
constexpr size_t kLook = size_t{64} << 20;
// With less than this left (or an eighth of a small machine or control group), nothing stays idle.
constexpr size_t kReserve = size_t{1} << 30;

char* map_pages(size_t size) {
  // Huge pages are aligned: ask for more, give back both ends.
  const size_t span = size < kHugePage ? size : size + kHugePage;
  void* raw = mmap(nullptr, span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(raw);
  if (span == size) return begin;
  const size_t before = -reinterpret_cast<uintptr_t>(begin) % kHugePage;
  if (before > 0) munmap(begin, before);
  if (before < kHugePage) munmap(begin + before + size, kHugePage - before);
#if defined(MADV_HUGEPAGE)
  madvise(begin + before, size, MADV_HUGEPAGE);
#endif
  return begin + before;
}

void unmap_pages(char* data, size_t size) noexcept {
  // The system may refuse to split a mapping (it has a largest number of them). The pages go back
  // all the same; only their addresses are lost.
  if (munmap(data, size) != 0) madvise(data, size, MADV_DONTNEED);
}

// Moves pages to addresses that are mapped already: nothing is copied, zeroed or faulted in, which
// is several times cheaper than pages fresh from the system. What the system does not move it takes
// back, and the pages at `to` stay fresh.
void move_pages(char* from, char* to, size_t size, size_t page) noexcept {
#if defined(MREMAP_DONTUNMAP)
  // Twice: a call that names the new address clears it before it looks whether it can move, and
  // another thread could be given what was cleared. The second call cannot fail for such a reason.
  void* const between =
      mremap(from, size, size, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, static_cast<void*>(nullptr));
  if (between != MAP_FAILED) {
    unmap_pages(from, size);
    if (mremap(between, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED)
      unmap_pages(static_cast<char*>(between), size);
    return;
  }
  // The system calls it a fault where neighbors are not one mapping: then try the halves.
  if (errno == EFAULT && size > kLeastMove) {
    const size_t half = size / 2 / page * page;
    move_pages(from, to, half, page);
    move_pages(from + half, to + half, size - half, page);
    return;
  }
#endif
  unmap_pages(from, size);
}

// Takes the place of torch's CPU allocator.
c10::Allocator* torch_allocator();

// Memory is a set of spans of pages, each in use or idle. A request gets the smallest idle span
// that holds it, and what it does not need of that stays idle; a span given back becomes one with
// idle neighbors. What does not fit comes from the system.
//
// Freeing must not fail, so it allocates nothing: a span keeps its entry in the index of idle spans
// while it is in use.
class Pool final : public c10::Allocator {
 public:
  static Pool& get() {
    static Pool* pool = new Pool();  // never destroyed: tensors may outlive static destruction
    return *pool;
  }

  c10::DataPtr allocate(size_t n) override {
    return serves(n) ? allocate_pages(n, false) : c10::GetDefaultCPUAllocator()->allocate(n);
  }
  c10::DataPtr allocate_pages(size_t n, bool for_torch) {
    void* const data = take(n, for_torch);
    if (data == nullptr) return torchs()->allocate(n);  // it stopped serving just now
    c10::DataPtr result(data, data, &Pool::release, c10::Device(c10::DeviceType::CPU));
    c10::profiledCPUMemoryReporter().New(data, n);
    return result;
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }

  bool serves(size_t n) const { return n >= kMinimum && enabled_.load(std::memory_order_relaxed); }

  PoolInfo info() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {limit_, idle_,   in_use_,         recent_peak(),
            hits_,  misses_, enabled_.load(), serving_.load()};
  }
  void set_limit(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    limit_is_given_ = true;
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
  void read_limits_below(const std::string& root) {
    MemoryLimit memory(root);
    std::lock_guard<std::mutex> lock(mutex_);
    memory_ = std::move(memory);
    limit_is_given_ = false;
    choose_limit();
  }

  bool serve_torch();
  void stop_serving();

  // Whether torch's tensors are served, and the allocator that served them before.
  bool serving() const { return serving_.load(std::memory_order_relaxed); }
  c10::Allocator* torchs() const { return torchs_.load(std::memory_order_acquire); }

  // Takes memory back if it is the pool's.
  bool release_if_own(void* data) noexcept {
    if (reinterpret_cast<uintptr_t>(data) % page_ != 0) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!spans_.contains(static_cast<char*>(data))) return false;
    }
    release(data);
    return true;
  }

 private:
  using Key = std::pair<size_t, char*>;  // size first: the index is searched for the best fit
  using Index = std::set<Key>;

  struct Span {
    size_t size = 0;
    bool for_torch = false;
    Index::node_type entry;                  // of the index, while the span is in use
    std::optional<Index::iterator> indexed;  // while it is idle
    Span *older = nullptr, *newer = nullptr;
    char* data = nullptr;
  };
  using Spans = std::map<char*, Span>;

  Pool() {
    choose_limit();
    torch_allocator();  // made now: SetAllocator hands it to threads that wait for nothing
    if (const char* text = std::getenv("FASTOPS_CPU_POOL_LIMIT")) {
      size_t bytes = 0;
      const char* const end = text + std::strlen(text);
      const auto [stop, error] =
          std::from_chars(text, end, bytes);  // unlike strtoull, takes no sign
      TORCH_CHECK(error == std::errc() && stop == end,
                  "FASTOPS_CPU_POOL_LIMIT must be a number of bytes, got '", text, "'");
      limit_ = bytes;
      limit_is_given_ = true;
      enabled_ = bytes > 0;
    }
    // A fork may happen while another thread holds the lock; the child would wait for it for ever.
    // The child gives its idle memory back: what two processes share is copied when written.
    // Last: the handlers must not meet a pool that failed to be made.
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); },
                   [] {
                     get().shrink(0);
                     get().mutex_.unlock();
                   });
  }

  // An eighth of the memory that there is, where only results of fastops come from the pool. Half
  // of it for all tensors: between two steps of a training nearly all of them are idle.
  void choose_limit() noexcept {
    if (!limit_is_given_) limit_ = memory_.total() / (serving() ? 2 : 8);
    shrink(limit_);
  }

  void* take(size_t n, bool for_torch) {
    const size_t size = whole_pages(n);
    std::lock_guard<std::mutex> lock(mutex_);
    if (for_torch && !serving()) return nullptr;
    look_at_pressure(size);
    if (const auto fit = index_.lower_bound(Key{size, nullptr}); fit != index_.end()) {
      Span& span = spans_.find(fit->second)->second;
      if (span.size > size) split(span, size);
      leave_idle(span);
      span.for_torch = for_torch;
      count(size, for_torch);
      ++hits_;
      return span.data;
    }
    char* data = map_pages(size);
    if (data != nullptr) {
      move_idle(data, size);
    } else {
      shrink(0);
      data = map_pages(size);
    }
    if (data == nullptr) {
      c10::profiledCPUMemoryReporter().OutOfMemory(n);
      TORCH_CHECK_WITH(OutOfMemoryError, false,
                       "fastops: not enough memory: you tried to allocate ", n, " bytes");
    }
    try {
      insert(data, size).for_torch = for_torch;
    } catch (...) {
      unmap_pages(data, size);
      throw;
    }
    count(size, for_torch);
    ++misses_;
    return data;
  }

  static void release(void* data) noexcept {
    try {
      c10::profiledCPUMemoryReporter().Delete(data);
    } catch (...) {  // it may want memory for its records
    }
    Pool& pool = get();
    std::lock_guard<std::mutex> lock(pool.mutex_);
    pool.give_back(pool.spans_.find(static_cast<char*>(data)));
  }

  void give_back(Spans::iterator at) noexcept {
    in_use_ -= at->second.size;
    if (at->second.for_torch && --torchs_tensors_ == 0) leave_torch();
    if (!enabled_) {
      unmap_pages(at->first, at->second.size);
      spans_.erase(at);
      return;
    }
    if (const auto next = std::next(at);
        next != spans_.end() && next->second.indexed && touches(at, next)) {
      leave_idle(next->second);
      at->second.size += next->second.size;
      spans_.erase(next);
    }
    if (at != spans_.begin())
      if (const auto last = std::prev(at); last->second.indexed && touches(last, at)) {
        leave_idle(last->second);
        last->second.size += at->second.size;
        spans_.erase(at);
        at = last;
      }
    become_idle(at->second);
    const size_t allowed = allowed_idle(0);
    if (idle_ > allowed) shrink(allowed);
  }

  static bool touches(Spans::iterator a, Spans::iterator b) {
    return a->first + a->second.size == b->first;
  }

  Span& insert(char* data, size_t size) {
    Index entries{{size, data}};
    Span& span = spans_[data];
    span.size = size;
    span.data = data;
    span.entry = entries.extract(entries.begin());
    return span;
  }

  // Leaves the first `size` bytes of an idle span to it; the rest is a span of its own, as old.
  void split(Span& span, size_t size) {
    Span& rest = insert(span.data + size, span.size - size);
    leave_idle(span);
    span.size = size;
    become_idle(rest);
    become_idle(span);
  }

  void become_idle(Span& span) noexcept {
    span.entry.value() = {span.size, span.data};
    span.indexed = index_.insert(std::move(span.entry)).position;
    span.older = newest_;
    span.newer = nullptr;
    (newest_ ? newest_->newer : oldest_) = &span;
    newest_ = &span;
    idle_ += span.size;
  }
  void leave_idle(Span& span) noexcept {
    span.entry = index_.extract(*span.indexed);
    span.indexed.reset();
    (span.older ? span.older->newer : oldest_) = span.newer;
    (span.newer ? span.newer->older : newest_) = span.older;
    idle_ -= span.size;
  }

  // Where a new span would make idle memory too much, pages of it are moved there. So idle memory
  // in pieces, none of which is large enough, does not come on top of a peak.
  void move_idle(char* data, size_t size) noexcept {
    const size_t allowed = allowed_idle(size);
    while (idle_ > allowed && size >= kLeastMove) {
      Span& span = *oldest_;
      const size_t n = std::min({span.size, size, whole_pages(idle_ - allowed)});
      leave_idle(span);
      span.size -= n;
      size -= n;
      move_pages(span.data + span.size, data + size, n, page_);
      keep_rest(span);
    }
    if (idle_ > allowed) shrink(allowed);
  }
  size_t whole_pages(size_t n) const noexcept { return (n + page_ - 1) / page_ * page_; }
  void keep_rest(Span& span) noexcept {
    if (span.size > 0)
      become_idle(span);
    else
      spans_.erase(span.data);
  }

  // Gives idle memory back, the oldest first, until no more than `bytes` are left. The lock is
  // held.
  void shrink(size_t bytes) noexcept {
    while (idle_ > bytes) {
      Span& span = *oldest_;
      const size_t less = std::min(span.size, whole_pages(idle_ - bytes));
      leave_idle(span);
      span.size -= less;
      unmap_pages(span.data + span.size, less);
      keep_rest(span);
    }
  }

  void count(size_t size, bool for_torch) noexcept {
    in_use_ += size;
    torchs_tensors_ += for_torch;
    handed_out_ += size;
    peak_ = std::max(peak_, in_use_);
    if (handed_out_ < kMemoryOfPeak * peak_) return;
    last_peak_ = peak_;
    peak_ = in_use_;
    handed_out_ = 0;
  }

  size_t recent_peak() const noexcept { return std::max(peak_, last_peak_); }

  // What may be idle when `more` bytes come on top of what is in use. All that the pool holds
  // exceeds the most that was in use lately by a 64th at most: a training step needs its peak again
  // and again, and nearly all of it is idle in between. A peak that does not come back is forgotten
  // once eight to sixteen times its size have been handed out.
  size_t allowed_idle(size_t more) const noexcept {
    const size_t used = in_use_ + more;
    const size_t peak = std::max(recent_peak(), used);
    return std::min(limit_, peak + peak / 64 - used);
  }

  // Gives idle memory back when the machine or a control group is nearly full. A look takes some
  // 20 us, as long as the page faults of 300 KB.
  void look_at_pressure(size_t size) noexcept {
    unlooked_ += size;
    if (idle_ == 0 || unlooked_ < std::min(kLook, limit_ / 2)) return;
    unlooked_ = 0;
    const size_t wanted = std::min(memory_.total() / 8, kReserve) + size;
    const size_t left = memory_.available();
    if (left < wanted) shrink(idle_ - std::min(idle_, wanted - left));
  }

  // Torch has its own allocator again once it is not served anymore and no memory is left that it
  // was served: before, that allocator could be asked to free some of it (raw_deallocate).
  void leave_torch() noexcept;

  static constexpr size_t kMemoryOfPeak = 8;

  const size_t page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::mutex mutex_;
  Spans spans_;  // by address
  Index index_;  // the idle ones
  Span *oldest_ = nullptr, *newest_ = nullptr;
  MemoryLimit memory_;
  size_t limit_ = 0, idle_ = 0, in_use_ = 0, hits_ = 0, misses_ = 0;
  size_t peak_ = 0, last_peak_ = 0, handed_out_ = 0, unlooked_ = 0;
  size_t torchs_tensors_ = 0;
  bool limit_is_given_ = false, in_place_ = false;
  std::atomic<bool> enabled_{true}, serving_{false};
  std::atomic<c10::Allocator*> torchs_{nullptr};
};

// Small tensors stay with torch's own allocator.
class TorchAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    Pool& pool = Pool::get();
    return pool.serving() && pool.serves(n) ? pool.allocate_pages(n, true)
                                            : pool.torchs()->allocate(n);
  }
  // Memory that was asked for raw comes back without a word of who gave it.
  c10::DeleterFnPtr raw_deleter() const override {
    return [](void* data) {
      Pool& pool = Pool::get();
      if (!pool.release_if_own(data)) pool.torchs()->raw_deallocate(data);
    };
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

c10::Allocator* torch_allocator() {
  static TorchAllocator* allocator = new TorchAllocator();  // never destroyed, as the pool
  return allocator;
}

bool Pool::serve_torch() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (serving()) return false;
  c10::Allocator* const present = c10::GetAllocator(c10::DeviceType::CPU);
  if (present != torch_allocator()) {
    TORCH_CHECK(!in_place_,
                "serve_torch: another library has replaced torch's CPU allocator since tensors "
                "were served; stop_serving() and free them first");
    TORCH_CHECK(present->raw_deleter() != nullptr,
                "serve_torch: torch's CPU allocator was replaced by one without a raw deleter");
    torchs_.store(present, std::memory_order_release);
    c10::SetAllocator(c10::DeviceType::CPU, torch_allocator());
    in_place_ = c10::GetAllocator(c10::DeviceType::CPU) == torch_allocator();
    TORCH_CHECK(in_place_,
                "serve_torch: another library has put its CPU allocator in the place of torch's, "
                "at a higher priority");
  }
  serving_ = true;
  choose_limit();
  return true;
}

void Pool::stop_serving() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!serving()) return;
  serving_ = false;
  choose_limit();
  if (torchs_tensors_ == 0) leave_torch();
}

void Pool::leave_torch() noexcept {
  if (serving() || !in_place_ || c10::GetAllocator(c10::DeviceType::CPU) != torch_allocator())
    return;
  c10::SetAllocator(c10::DeviceType::CPU, torchs());
  in_place_ = false;
}

}  // namespace

c10::Allocator* pool_allocator() { return &Pool::get(); }
bool pool_serves(size_t nbytes) { return nbytes >= kMinimum && Pool::get().serves(nbytes); }
PoolInfo pool_info() { return Pool::get().info(); }
void pool_set_limit(size_t bytes) { Pool::get().set_limit(bytes); }
void pool_trim() { Pool::get().trim(); }
void pool_enable(bool on) { Pool::get().enable(on); }
bool pool_serve_torch() { return Pool::get().serve_torch(); }
void pool_stop_serving() { Pool::get().stop_serving(); }
void pool_read_limits_below(const std::string& root) { Pool::get().read_limits_below(root); }

}  // namespace fastops
