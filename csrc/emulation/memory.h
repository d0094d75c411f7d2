// "Device memory": buffers between pages that cannot be touched, and the check and count of every
// access that a kernel makes through load() and store() of csrc/cuda/pack.cuh.
#pragma once
#include <csignal>
#include <map>
#include <tuple>

#include "block.h"

namespace fastops::emulation {

// ------------------------------------------------------------------------------------------------
// fenced buffers

// [begin, end) is the buffer; the pages around it that may be touched hold kCanary where they are
// not the buffer.
struct Fenced {
  char *begin, *end, *pages;
  size_t mapped;
  bool constant;
};
inline Fenced fenced[2048];
inline unsigned fenced_count = 0;
constexpr unsigned char kCanary = 0xA5;

// A buffer full of NaNs that starts `offset` bytes after a 16-byte boundary; or, with `flush`, one
// that ends at the last byte before the guard page (its alignment is then what `bytes` makes it),
// so that even an access that goes around load() faults.
inline void* allocate(size_t bytes, size_t offset, bool flush) {
  if (fenced_count == std::size(fenced)) return nullptr;
  const size_t room = (bytes + offset + kPage - 1) / kPage * kPage;
  void* mapping = mmap(nullptr, room + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  char* pages = static_cast<char*>(mapping);
  if (room && mprotect(pages + kPage, room, PROT_READ | PROT_WRITE) != 0) return nullptr;
  char* begin = flush ? pages + kPage + room - bytes : pages + kPage + offset;
  std::memset(pages + kPage, kCanary, room);
  std::memset(begin, 0xff, bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(pages + kPage, room);
  __asan_unpoison_memory_region(begin, bytes);
#endif
  fenced[fenced_count++] = {begin, begin + bytes, pages, room + 2 * kPage, false};
  return begin;
}

// From now on, nobody may write to the buffer.
inline bool protect(void* buffer) {
  for (unsigned i = 0; i < fenced_count; ++i) {
    Fenced& f = fenced[i];
    if (f.begin != buffer) continue;
    f.constant = true;
    return mprotect(f.pages + kPage, f.mapped - 2 * kPage, PROT_READ) == 0;
  }
  return false;
}

// False where something beside the buffer was overwritten.
inline bool release_buffer(void* buffer) {
  for (unsigned i = 0; i < fenced_count; ++i) {
    const Fenced f = fenced[i];
    if (f.begin != buffer) continue;
    bool whole = true;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(f.pages + kPage, f.mapped - 2 * kPage);
#endif
    const auto* byte = reinterpret_cast<const unsigned char*>(f.pages + kPage);
    for (; byte < reinterpret_cast<unsigned char*>(f.begin); ++byte) whole &= *byte == kCanary;
    byte = reinterpret_cast<unsigned char*>(f.end);
    for (; byte < reinterpret_cast<unsigned char*>(f.pages + f.mapped - kPage); ++byte)
      whole &= *byte == kCanary;
    munmap(f.pages, f.mapped);
    fenced[i] = fenced[--fenced_count];
    return whole;
  }
  return false;
}

// For programs: a touched guard page is reported with the thread that did it, then the process ends
// as it would have.
inline void explain_faults() {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  static char
      stack[64 << 10];  // the fault may be on a thread's own stack, of which little may be left
  stack_t alternate{};
  alternate.ss_sp = stack;
  alternate.ss_size = sizeof stack;
  sigaltstack(&alternate, nullptr);
  struct sigaction action{};
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESETHAND;
  action.sa_sigaction = [](int, siginfo_t* info, void*) {
    const Thread* t = machine.current;
    std::printf("invalid access at %p: %s\n", info->si_addr,
                t ? place(t).text : "outside a kernel");
    std::fflush(stdout);
  };
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
#endif
}

// ------------------------------------------------------------------------------------------------
// sectors

constexpr uintptr_t kSector = 32;  // what a GPU's caches and memory move at the least

// One sector that one instruction of one warp asks for. VecIO are in the same instruction where
// they are at the same place in the program for the same time in this block.
struct Request {
  bool store;
  uintptr_t sector;
  uint64_t warp, time;
  const void* place;
  auto operator<=>(const Request&) const = default;
};
struct Recorder {
  bool on = false;
  std::vector<Request> requests;
  std::map<std::pair<unsigned, const void*>, uint64_t> times;  // by thread and place, of this block
  uint64_t block = 0;
};
inline Recorder recorder;

inline void record(bool store, const void* address, size_t bytes, const void* place) {
  Recorder& r = recorder;
  const Thread* t = machine.current;
  if (r.block != machine.block_number) r.times.clear();
  r.block = machine.block_number;
  const uint64_t time = r.times[{t->linear, place}]++,
                 warp = r.block * (kMaxThreads / 32) + t->linear / 32;
  const auto first = reinterpret_cast<uintptr_t>(address), last = first + bytes - 1;
  for (uintptr_t sector = first / kSector; sector <= last / kSector; ++sector)
    r.requests.push_back({store, sector, warp, time, place});
}

// Since the last call, of loads and of stores: the sectors that instructions asked for (those of
// one warp's instruction together), and the different ones among all.
struct Sectors {
  uint64_t requested[2], distinct[2];
};
inline Sectors take_sectors() {
  Sectors found{};
  auto& requests = recorder.requests;
  std::sort(requests.begin(), requests.end());
  const Request* before = nullptr;
  for (const Request& r : requests) {
    found.requested[r.store] += !before || r != *before;
    found.distinct[r.store] += !before || r.store != before->store || r.sector != before->sector;
    before = &r;
  }
  requests.clear();
  return found;
}

// ------------------------------------------------------------------------------------------------
// access

FASTOPS_UNSANITIZED inline void check(const void* address, size_t bytes, size_t alignment,
                                      bool store) {
  if (!machine.current) return;
  const char* what = store ? "store" : "load";
  if (reinterpret_cast<uintptr_t>(address) % alignment)
    fail("misaligned %s of %zu bytes at %p: %s", what, bytes, address, place(machine.current).text);
  const char* p = static_cast<const char*>(address);
  const Fenced* f = fenced;
  for (unsigned i = 0; i < fenced_count; ++i, ++f) {
    if (p < f->pages || p >= f->pages + f->mapped) continue;
    if (p < f->begin || p + bytes > f->end)
      fail("out-of-bounds %s of %zu bytes, %td bytes %s a buffer of %td: %s", what, bytes,
           p < f->begin ? f->begin - p : p + bytes - f->end, p < f->begin ? "before" : "after",
           f->end - f->begin, place(machine.current).text);
    if (store && f->constant)
      fail("store of %zu bytes to a constant buffer: %s", bytes, place(machine.current).text);
    return;
  }
}
FASTOPS_UNSANITIZED __attribute__((noinline)) inline void loads(const void* address, size_t bytes,
                                                                size_t alignment) {
  check(address, bytes, alignment, false);
  if (recorder.on) record(false, address, bytes, __builtin_return_address(0));
  ++counters.loads;
  counters.loaded_bytes += bytes;
  counters.wide_loads += bytes == 16;
}
FASTOPS_UNSANITIZED __attribute__((noinline)) inline void stores(const void* address, size_t bytes,
                                                                 size_t alignment) {
  check(address, bytes, alignment, true);
  if (recorder.on) record(true, address, bytes, __builtin_return_address(0));
  ++counters.stores;
  counters.stored_bytes += bytes;
  counters.wide_stores += bytes == 16;
}

}  // namespace fastops::emulation
