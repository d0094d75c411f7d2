// A caching allocator for large CPU results. Memory fresh from the system costs a page fault per 4
// KB, several times what a memory-bound op costs itself; memory that an earlier result gave back
// costs nothing.
#pragma once
#include <c10/core/Allocator.h>

#include <cstddef>

namespace fastops {

c10::Allocator* pool_allocator();

// Whether a result of so many bytes comes from the pool: it is on, and the result is at least 128
// KiB.
bool pool_serves(size_t nbytes);

struct PoolInfo {
  size_t limit;         // bytes that may lie idle
  size_t cached;        // bytes that do
  size_t in_use;        // bytes held by living tensors
  size_t hits, misses;  // allocations served from idle memory, and from the system
  bool enabled;
};
PoolInfo pool_info();
void pool_set_limit(size_t bytes);  // idle memory above it is given back at once
void pool_trim();                   // gives all idle memory back
void pool_enable(
    bool on);  // off: new results come from torch's allocator, idle memory is given back

}  // namespace fastops
