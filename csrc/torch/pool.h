// A caching allocator for large CPU tensors. Memory fresh from the system costs a page fault per 4
// KB, several times what a memory-bound op costs itself; memory that an earlier tensor gave back
// costs nothing.
#pragma once
#include <c10/core/Allocator.h>

#include <cstddef>
#include <string>

namespace fastops {

c10::Allocator* pool_allocator();

// Whether a result of so many bytes comes from the pool: it is on, and the result is at least 128
// KiB.
bool pool_serves(size_t nbytes);

struct PoolInfo {
  size_t limit;         // bytes that may be idle
  size_t cached;        // bytes that are
  size_t in_use;        // bytes held by living tensors
  size_t peak;          // the most that was in use lately, which bounds what may be idle
  size_t hits, misses;  // allocations served from idle memory, and from the system
  bool enabled;
  bool serves_torch;  // all CPU tensors come from the pool, not only results of fastops
};
PoolInfo pool_info();
void pool_set_limit(size_t bytes);  // idle memory above it is given back at once
void pool_trim();                   // gives all idle memory back
void pool_enable(
    bool on);  // off: new results come from torch's allocator, idle memory is given back

// Puts the pool in the place of torch's CPU allocator; false where it is there already.
// Tensors that are alive stay as they are, here and when it stops.
bool pool_serve_torch();
void pool_stop_serving();

// For tests: the files that tell of the machine's memory and of control groups are read below
// `root`, and the limit is what they say.
void pool_read_limits_below(const std::string& root);

}  // namespace fastops
