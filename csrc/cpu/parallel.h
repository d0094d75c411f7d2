// Threads for the loops: one call is one parallel region. csrc/torch defines parallel_for by
// at::parallel_for, so that torch.set_num_threads holds here too.
#pragma once
#include <cstdint>

#include "../math.h"

namespace fastops::cpu {

// Calls body(context, begin, end) on disjoint ranges that cover [0, n), each of at least `grain`
// items but the last.
void parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

template <class F>
FASTOPS_FN void parallel(int64_t n, int64_t grain, F f) {
  if (n <= grain) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  parallel_for(
      n, grain,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); },
      &f);
}

// Calls f(begin, end) on disjoint ranges that cover [0, n) and begin at multiples of `size`, so
// that all whole vectors of aligned memory are aligned.
template <int64_t size, class F>
FASTOPS_FN void parallel_vectors(int64_t n, int64_t grain, F f) {
  parallel((n + size - 1) / size, grain / size, [=](int64_t first, int64_t last) {
    f(first * size, last * size < n ? last * size : n);
  });
}

}  // namespace fastops::cpu
