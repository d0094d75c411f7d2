// Runs a kernel's grid on the CPU: one block after another, a fiber per thread of the block, all on
// the calling thread. Barriers, warp operations, shared memory, launch limits, and the errors that
// a GPU would leave undefined. What kernels call is in cuda_runtime.h; nothing here knows a kernel.
#pragma once
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct __attribute__((aligned(16), may_alias)) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fastops::emulation {

// ------------------------------------------------------------------------------------------------
// state

// What a run has done so far. Loads and stores are those made through load() and store() of
// csrc/cuda/pack.cuh.
struct Counters {
  uint64_t launches, blocks, threads;
  uint64_t loads, loaded_bytes, wide_loads;  // wide: 16 bytes in one instruction
  uint64_t stores, stored_bytes, wide_stores;
};
inline Counters counters;

// Where a launch went: the device that was current, and the stream. ExpScratch while there is a
// list to keep them in.
struct Launched {
  int device;
  const void* stream;
};
inline std::vector<Launched>* launched = nullptr;
inline int (*current_device)() = [] { return 0; };

// While there is one, launches are kept in it instead of being run, as on a stream that is
// captured.
struct Graph {
  std::vector<std::function<bool()>> work;  // each: whether it ran well
};
inline Graph* graph = nullptr;

// The order in which blocks, and the threads of a block, get their turn.
enum class Order : int { kForward, kReverse, kShuffled };
inline Order order = Order::kForward;
inline uint64_t seed = 1;  // of Order::kShuffled

inline int multiprocessors =
    2;  // what kernels are told: few, so that grid-stride loops go round at small sizes

enum class State : uint8_t { kReady = 1, kAtBarrier, kAtWarp, kDone };
enum class WarpOp : uint8_t { kShuffle, kBallot, kSync };
enum class BarrierOp : uint8_t { kPlain, kOr, kAnd, kCount };

struct Thread : Fiber {
  uint3 index;
  unsigned linear;  // the number CUDA gives it: warps are made of neighbours in this
  unsigned turn;    // its place in the order of this block, and in `states`
  unsigned mask;    // of the warp operation that it waits in
  WarpOp warp_op;
  BarrierOp barrier_op;
  int source;      // lane that a shuffle reads
  uint64_t value;  // handed in to, and back by, a barrier or warp operation
  const char* site;
  char* meeting;  // where the threads of one barrier or warp operation synchronise, for
                  // ThreadSanitizer
};

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kPage = 4096, kStaticSharedLimit = 48 << 10, kDynamicSharedLimit = 227 << 10;
constexpr size_t kParameterLimit = 32764;

struct SharedArray {
  const void* key;
  char *pages, *data;
  size_t bytes, mapped;
  uint64_t filled_for;  // the block that it holds fresh NaNs for
};

struct Machine {
  dim3 grid, block;
  uint3 block_index;
  unsigned size = 0, alive = 0, waiting = 0;  // threads of a block: all, not returned, at a barrier
  Thread threads[kMaxThreads];                // by turn
  State states[kMaxThreads];  // by turn, apart from `threads` so that a memchr finds who is next
  unsigned turn_of[kMaxThreads];  // linear -> turn
  Thread* current = nullptr;
  Fiber launcher;
  bool fresh = false;  // the launcher has just switched to the first thread of a block
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  uint64_t random = 1, block_number = 0;
  size_t shared_bytes = 0, dynamic_bytes = 0;
  SharedArray arrays[64];
  unsigned array_count = 0;
  char start = 0, finish = 0;  // synchronisation points of a launch
  std::deque<char> meetings;
  char* meeting = nullptr;  // of the block's present barrier
  std::vector<SharedArray> retired;
  char error[512] = "";
  std::recursive_mutex mutex;
};
inline Machine machine;

// ------------------------------------------------------------------------------------------------
// errors

struct Place {
  char text[96];
};
FASTOPS_UNSANITIZED inline Place place(const Thread* t) {
  Place p;
  const uint3 b = machine.block_index, i = t->index;
  const Unwatched unwatched;
  std::snprintf(p.text, sizeof p.text, "block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, i.x,
                i.y, i.z);
  return p;
}

// Ends the launch: its threads are abandoned where they are. The first message is kept.
[[noreturn]] FASTOPS_UNSANITIZED __attribute__((format(printf, 1, 2))) inline void fail(
    const char* format, ...) {
  if (!machine.error[0]) {
    const Unwatched unwatched;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(machine.error, sizeof machine.error, format, arguments);
    va_end(arguments);
  }
  Thread* from = machine.current;
  machine.current = nullptr;
  switch_fiber(*from, machine.launcher);
  __builtin_unreachable();
}

// ------------------------------------------------------------------------------------------------
// scheduling

// Hands the turn to the next thread that can go on, or back to the launcher once all have returned.
FASTOPS_UNSANITIZED inline void next() {
  Machine& m = machine;
  Thread* from = m.current;
  const State* states = m.states;
  const unsigned after = from->turn + 1;
  const void* found;
  {
    const Unwatched unwatched;
    found = std::memchr(states + after, static_cast<int>(State::kReady), m.size - after);
    if (!found) found = std::memchr(states, static_cast<int>(State::kReady), after);
  }
  if (found) {
    Thread* to = &m.threads[static_cast<const State*>(found) - states];
    if (to == from) return;
    m.current = to;
    switch_fiber(*from, *to);
    return;
  }
  if (m.alive == 0) {
    m.current = nullptr;
    switch_fiber(*from, m.launcher);
    return;
  }
  for (unsigned i = 0; i < m.size; ++i) {
    const Thread* t = &m.threads[i];
    if (states[i] == State::kAtBarrier)
      fail("deadlock: %s waits at __syncthreads %s", place(t).text, t->site);
    if (states[i] != State::kAtWarp) continue;
    for (unsigned lane = t->linear & ~31u, k = 0; k < 32 && lane + k < m.size; ++k)
      if (t->mask >> k & 1 && states[m.turn_of[lane + k]] == State::kDone)
        fail("warp mask %08x names lane %u, which has returned: %s", t->mask, k, place(t).text);
    fail("deadlock: %s waits at a warp operation for the lanes of mask %08x", place(t).text,
         t->mask);
  }
  fail("deadlock");
}

// A place for one barrier or warp operation to synchronise at. Never used again during a launch: a
// thread that runs ahead and arrives at the next one must not lend its later writes to those that
// still leave this one.
FASTOPS_UNSANITIZED inline char* new_meeting() {
#if defined(__SANITIZE_THREAD__)
  const Unwatched unwatched;
  machine.meetings.push_back(0);
  return &machine.meetings.back();
#else
  return nullptr;
#endif
}

FASTOPS_UNSANITIZED inline void entry() {
  Machine& m = machine;
  arrived(m.fresh ? &m.launcher : nullptr);
  m.fresh = false;
  acquire(&m.start);
  m.body(m.argument);
  release(&m.finish);
  m.states[m.current->turn] = State::kDone;
  --m.alive;
  if (m.waiting && m.waiting == m.alive)
    fail("__syncthreads is waited at but %s has returned", place(m.current).text);
  next();
  __builtin_unreachable();
}

// ------------------------------------------------------------------------------------------------
// barrier and warp

FASTOPS_UNSANITIZED __attribute__((noinline)) inline int barrier(BarrierOp op, bool predicate,
                                                                 const char* site) {
  Machine& m = machine;
  Thread* t = m.current;
  t->barrier_op = op;
  t->site = site;
  t->value = predicate;
  if (m.waiting == 0) m.meeting = new_meeting();
  for (unsigned i = 0; i < m.size; ++i) {
    if (m.states[i] != State::kAtBarrier) continue;
    const Thread* other = &m.threads[i];
    if (other->barrier_op != op || std::strcmp(other->site, site) != 0)
      fail("divergent barrier: %s is at %s, %s at %s", place(t).text, site, place(other).text,
           other->site);
    break;  // those that wait already agree among themselves
  }
  char* meeting = m.meeting;
  release(meeting);
  m.states[t->turn] = State::kAtBarrier;
  if (++m.waiting == m.size) {
    unsigned votes = 0;
    for (unsigned i = 0; i < m.size; ++i) votes += m.threads[i].value != 0;
    for (unsigned i = 0; i < m.size; ++i) {
      m.threads[i].value = op == BarrierOp::kOr    ? votes > 0
                           : op == BarrierOp::kAnd ? votes == m.size
                                                   : votes;
      m.states[i] = State::kReady;
    }
    m.waiting = 0;
  } else if (m.waiting == m.alive) {
    fail("__syncthreads is waited at by %s but other threads of the block have returned",
         place(t).text);
  } else {
    next();
  }
  acquire(meeting);
  return static_cast<int>(t->value);
}

// All lanes of `mask` meet; a shuffle then gets the value of lane `source`, a ballot one bit a
// lane. Only kSync orders memory: shuffles and votes do not on a GPU either.
FASTOPS_UNSANITIZED __attribute__((noinline)) inline uint64_t warp(WarpOp op, unsigned mask,
                                                                   uint64_t value, int source) {
  Machine& m = machine;
  Thread* t = m.current;
  const unsigned lane = t->linear & 31, first = t->linear & ~31u;
  if (!(mask >> lane & 1))
    fail("warp operation with mask %08x, which lacks its caller, %s", mask, place(t).text);
  t->warp_op = op;
  t->mask = mask;
  t->value = value;
  t->source = source;
  t->meeting = nullptr;
  Thread* lanes[32];
  unsigned here = 0;
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (first + l >= m.size)
      fail("warp mask %08x names lane %u, which the block does not have: %s", mask, l,
           place(t).text);
    lanes[l] = &m.threads[m.turn_of[first + l]];
    const State state = m.states[lanes[l]->turn];
    if (state == State::kDone)
      fail("warp mask %08x names lane %u, which has returned: %s", mask, l, place(t).text);
    if (lanes[l] == t || (state == State::kAtWarp && lanes[l]->mask == mask)) {
      here |= 1u << l;
      if (lanes[l]->meeting) t->meeting = lanes[l]->meeting;
      if (lanes[l]->warp_op != op)
        fail("lanes of one warp meet in different operations: %s and %s", place(t).text,
             place(lanes[l]).text);
    }
  }
  if (op == WarpOp::kSync) {
    if (!t->meeting) t->meeting = new_meeting();
    release(t->meeting);
  }
  char* meeting = t->meeting;
  m.states[t->turn] = State::kAtWarp;
  if (here == mask) {
    uint64_t results[32];
    uint64_t votes = 0;
    for (unsigned l = 0; l < 32; ++l)
      if (mask >> l & 1) votes |= static_cast<uint64_t>(lanes[l]->value != 0) << l;
    for (unsigned l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      const int from = lanes[l]->source;
      if (op == WarpOp::kShuffle && !(mask >> from & 1))
        fail("%s shuffles from lane %d, which is not in its mask %08x", place(lanes[l]).text, from,
             mask);
      results[l] = op == WarpOp::kShuffle ? lanes[from]->value : votes;
    }
    for (unsigned l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      lanes[l]->value = results[l];
      m.states[lanes[l]->turn] = State::kReady;
    }
  } else {
    next();
  }
  if (op == WarpOp::kSync) acquire(meeting);
  return t->value;
}

// ------------------------------------------------------------------------------------------------
// shared memory

// The block's array for `key` (one per declaration). It ends against a page that cannot be touched,
// starts behind one, and holds 0xff, which is a NaN in every floating type, until it is written.
FASTOPS_UNSANITIZED inline void* shared(const void* key, size_t bytes) {
  Machine& m = machine;
  SharedArray* array = nullptr;
  for (unsigned i = 0; i < m.array_count && !array; ++i)
    if (m.arrays[i].key == key && m.arrays[i].bytes == bytes) array = &m.arrays[i];
  if (array && array->filled_for == m.block_number) return array->data;
  const Unwatched unwatched;
  if (!array) {
    if (m.array_count == std::size(m.arrays)) fail("too many shared arrays for the emulator");
    const size_t room = (bytes + kPage - 1) / kPage * kPage;
    void* pages = mmap(nullptr, room + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED ||
        mprotect(static_cast<char*>(pages) + kPage, room, PROT_READ | PROT_WRITE) != 0)
      fail("the emulator has no memory for a shared array");
    array = &m.arrays[m.array_count++];
    char* start = static_cast<char*>(pages);
    *array = {key, start, start + kPage + room - (bytes + 15) / 16 * 16, bytes, room + 2 * kPage,
              0};
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(array->pages + kPage, room);
    __asan_unpoison_memory_region(array->data, bytes);
#endif
  }
  m.shared_bytes += bytes;
  if (m.shared_bytes > kStaticSharedLimit + m.dynamic_bytes)
    fail("more than 48 KB of static shared memory");
  std::memset(array->data, 0xff, bytes);
  array->filled_for = m.block_number;
  return array->data;
}

// Under ThreadSanitizer the next block gets arrays at other addresses, or it would seem to race
// with this one.
FASTOPS_UNSANITIZED inline void retire_shared() {
#if defined(__SANITIZE_THREAD__)
  Machine& m = machine;
  for (unsigned i = 0; i < m.array_count; ++i) m.retired.push_back(m.arrays[i]);
  m.array_count = 0;
#endif
}

// ------------------------------------------------------------------------------------------------
// launch

FASTOPS_UNSANITIZED inline uint64_t next_random() {
  uint64_t& r = machine.random;
  r ^= r << 13;
  r ^= r >> 7;
  r ^= r << 17;
  return r;
}

FASTOPS_UNSANITIZED inline void run_block() {
  Machine& m = machine;
  ++m.block_number;
  m.alive = m.size;
  m.waiting = 0;
  m.shared_bytes = 0;
  if (order == Order::kShuffled)
    for (unsigned i = m.size; i > 1; --i) std::swap(m.turn_of[i - 1], m.turn_of[next_random() % i]);
  for (unsigned i = 0; i < m.size; ++i) {
    Thread& t = m.threads[m.turn_of[i]];
    t.linear = i;
    t.turn = m.turn_of[i];
    t.index = {i % m.block.x, i / m.block.x % m.block.y, i / m.block.x / m.block.y};
    t.value = 0;
    m.states[i] = State::kReady;
    prepare(t, &entry);
  }
#if defined(__SANITIZE_THREAD__)
  m.launcher.tsan = __tsan_get_current_fiber();
#endif
  m.fresh = true;
  m.current = &m.threads[0];
  switch_fiber(m.launcher, m.threads[0]);
  for (unsigned i = 0; i < m.size; ++i) dispose(m.threads[i]);
  retire_shared();
  ++counters.blocks;
  counters.threads += m.size;
}

// Null if the configuration is one that a GPU accepts, else what is wrong with it.
inline const char* refuse(dim3 grid, dim3 block, size_t dynamic_bytes, size_t parameter_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || grid.x == 0 || grid.y == 0 || grid.z == 0) return "an empty grid or block";
  if (threads > kMaxThreads || block.z > 64)
    return "more than 1024 threads in a block, or more than 64 in z";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return "a grid beyond (2^31 - 1, 65535, 65535)";
  if (dynamic_bytes > kDynamicSharedLimit) return "more than 227 KB of dynamic shared memory";
  if (parameter_bytes > kParameterLimit) return "more than 32764 bytes of kernel parameters";
  return nullptr;
}

// Runs body(argument) once per thread. False, with machine.error set, where a thread did what it
// must not.
FASTOPS_UNSANITIZED inline bool run_grid(dim3 grid, dim3 block, size_t dynamic_bytes,
                                         void (*body)(void*), void* argument) {
  Machine& m = machine;
  m.grid = grid;
  m.block = block;
  m.size = block.x * block.y * block.z;
  m.dynamic_bytes = dynamic_bytes;
  m.body = body;
  m.argument = argument;
  m.error[0] = 0;
  m.random = seed * 0x9E3779B97F4A7C15ull + 1;
  for (unsigned i = 0; i < m.size; ++i)
    m.turn_of[i] = order == Order::kReverse ? m.size - 1 - i : i;
  new_launch();
  release(&m.start);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  // An odd step that is prime to the number of blocks walks all of them in a mixed order, without a
  // table.
  uint64_t step = 1, at = 0;
  if (order == Order::kShuffled) {
    at = next_random() % blocks;
    do step = next_random() % blocks + 1;
    while (std::__gcd(step, blocks) != 1);
  }
  for (uint64_t i = 0; i < blocks && !m.error[0]; ++i) {
    const uint64_t b = order == Order::kReverse ? blocks - 1 - i : at;
    at = (at + step) % blocks;
    m.block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y),
                     unsigned(b / grid.x / grid.y)};
    run_block();
  }
  acquire(&m.finish);
  m.meetings.clear();
  for (const SharedArray& array : m.retired) munmap(array.pages, array.mapped);
  m.retired.clear();
#if defined(__SANITIZE_ADDRESS__)
  // Frames of abandoned threads never unpoison what they poisoned.
  if (m.error[0])
    for (unsigned i = 0; i < m.size; ++i)
      __asan_unpoison_memory_region(m.threads[i].stack, kStackBytes);
#endif
  return !m.error[0];
}

}  // namespace fastops::emulation
