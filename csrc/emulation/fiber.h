// One thread of a block as a fiber: a stack, and the switch from one stack to another (x86-64 by
// hand, elsewhere by ucontext), told to AddressSanitizer and ThreadSanitizer. Nothing of CUDA is in
// here.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && !defined(FASTOPS_EMULATION_UCONTEXT)
#define FASTOPS_EMULATION_BY_HAND 1
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

// The scheduler's own memory is not the kernel's: no sanitizer may count it.
#define FASTOPS_UNSANITIZED __attribute__((no_sanitize("address", "thread", "undefined")))

namespace fastops::emulation {

// ------------------------------------------------------------------------------------------------
// sanitizers

// While one of these lives, ThreadSanitizer ignores what this fiber touches (library calls made by
// the scheduler).
struct Unwatched {
#if defined(__SANITIZE_THREAD__)
  FASTOPS_UNSANITIZED Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  FASTOPS_UNSANITIZED ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  ~Unwatched() {}
#endif
};

// "All that this fiber did before release(p) is seen by a fiber after its acquire(p)."
inline void release([[maybe_unused]] void* point) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(point);
#endif
}
inline void acquire([[maybe_unused]] void* point) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(point);
#endif
}

// ------------------------------------------------------------------------------------------------
// fibers

constexpr size_t kStackBytes =
    256 << 10;  // reserved, not committed: a page is only taken once it is touched

struct Fiber {
  char* stack = nullptr;  // null for the fiber that is the launching thread itself
#if FASTOPS_EMULATION_BY_HAND
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
  bool spare = false;
#endif
};

#if FASTOPS_EMULATION_BY_HAND
// Saves the callee-saved registers on the running stack and takes those of the other: 20 times
// faster than swapcontext, which makes a system call for the signal mask.
__attribute__((naked, noinline)) inline void switch_stack([[maybe_unused]] void** save,
                                                          [[maybe_unused]] void* to) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

FASTOPS_UNSANITIZED inline char* new_stack() {
  const Unwatched unwatched;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (stack == MAP_FAILED) __builtin_trap();
  return static_cast<char*>(stack);
}

// ThreadSanitizer would take two threads of different blocks on one stack, or in one fiber, for
// ordered or for racing: during a launch each has its own. They are slow to make, so the next
// launch takes them over.
#if defined(__SANITIZE_THREAD__)
struct Spare {
  char* stack;
  void* tsan;
};
inline Spare spares[4096];
inline unsigned spare_count = 0, spares_used = 0;
#endif
FASTOPS_UNSANITIZED inline void new_launch() {
#if defined(__SANITIZE_THREAD__)
  spares_used = 0;
#endif
}

// Gives the fiber a stack on which `entry` starts when it is first switched to.
FASTOPS_UNSANITIZED inline void prepare(Fiber& fiber, void (*entry)()) {
#if defined(__SANITIZE_THREAD__)
  fiber.spare = spares_used < spare_count;
  const Spare s = fiber.spare ? spares[spares_used++] : Spare{new_stack(), __tsan_create_fiber(0)};
  fiber.stack = s.stack;
  fiber.tsan = s.tsan;
#else
  if (!fiber.stack) fiber.stack = new_stack();
#endif
#if FASTOPS_EMULATION_BY_HAND
  // As if `entry` had been called with its return address (null) at the top of a 16-byte aligned
  // frame.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  top[1] = nullptr;
  top[0] = reinterpret_cast<void*>(entry);
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
  fiber.stack_pointer = top - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
#if defined(__SANITIZE_ADDRESS__)
  fiber.bottom = fiber.stack;
  fiber.bytes = kStackBytes;
#endif
}

// The fiber has run to its end.
FASTOPS_UNSANITIZED inline void dispose([[maybe_unused]] Fiber& fiber) {
#if defined(__SANITIZE_THREAD__)
  if (fiber.spare) return;
  if (spare_count < sizeof spares / sizeof *spares) {
    spares[spare_count++] = {fiber.stack, fiber.tsan};
    spares_used = spare_count;
  } else {
    __tsan_destroy_fiber(fiber.tsan);
    const Unwatched unwatched;
    munmap(fiber.stack, kStackBytes);
  }
#endif
}

FASTOPS_UNSANITIZED inline void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: the switch itself orders nothing, only barriers do
#endif
#if FASTOPS_EMULATION_BY_HAND
  switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// To be called first on a fresh fiber, before any instrumented code; `from` is the launching thread
// where that was the one to switch here, null else.
FASTOPS_UNSANITIZED inline void arrived([[maybe_unused]] Fiber* from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (from) {
    from->bottom = bottom;
    from->bytes = bytes;
  }
#endif
}

}  // namespace fastops::emulation
