// The maximum of a contiguous row and the sum of its exponentials, in one pass over memory: block
// by block, while a block is in the first-level cache. And how the results of a row are stored. No
// formula by name.
#pragma once
#include <cstdlib>

#include "../formulas/softmax.h"
#include "vec_io.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kRowsGrain = 16384;  // elements a thread takes at least
constexpr int64_t kMaxBlocks = 256;    // of one row
constexpr int64_t kMinBlock = 2048;    // elements

constexpr int kUnroll = 4;  // vectors of a contiguous row whose exponentials are taken at once

FASTOPS_FN int64_t block_of(int64_t n) {
  const int64_t least = (n + kMaxBlocks - 1) / kMaxBlocks;
  return least <= kMinBlock ? kMinBlock : (least + 63) / 64 * 64;
}
FASTOPS_FN int64_t rows_per_thread(int64_t n) {
  return n >= kRowsGrain ? 1 : kRowsGrain / (n < 1 ? 1 : n);
}

// A sum in double, lane by lane.
template <class V>
struct PromotedSum {
  static constexpr int count = sizeof(double) / sizeof(typename V::value_type);
  Vec<double> lanes[count];
  FASTOPS_FN PromotedSum() {
    for (auto& l : lanes) l = Vec<double>(0);
  }
  FASTOPS_FN void add(const V& v) {
    Vec<double> wide[count];
    promote(v, wide);
    for (int k = 0; k < count; ++k) lanes[k] = lanes[k] + wide[k];
  }
  FASTOPS_FN double total() const { return sum_of_lanes(lanes); }
};
template <class V>
FASTOPS_FN typename V::value_type max_lanes(const V& v) {
  return reduce_lanes(v, [](auto a, auto b) { return larger(a, b); });
}

// for_each_vector() with the elements of `row` loaded: body(i, n, x).
template <class L, class scalar_t, class Body>
FASTOPS_FN void each_group(const scalar_t* row, int64_t begin, int64_t end, Body body) {
  for_each_vector<L::size>(begin, end, [&](int64_t i, auto n) {
    typename L::V x[L::count];
    L::load(row + i, n, x);
    body(i, n, x);
  });
}

// Where the results of a row go. If the row is streamed, its vectors must be aligned: the first one
// of a block is cut off after `head` elements.
template <class L, class scalar_t>
struct Out {
  scalar_t* row;
  bool streamed;
  int64_t head;

  // Row r of n elements, all of them at `rows`; null where there are none.
  FASTOPS_FN Out(scalar_t* rows, int64_t r, int64_t n, bool streamed)
      : row(rows ? rows + r * n : nullptr),
        streamed(streamed),
        head(streamed ? (L::size - r * n % L::size) % L::size : 0) {}
  template <class N>
  FASTOPS_FN void store(int64_t i, N count, const typename L::V (&v)[L::count]) const {
    L::store(row + i, count, v, streamed);
  }
  template <bool hot = true, class Body>
  FASTOPS_FN void for_each_vector(int64_t begin, int64_t end, Body body) const {
    int64_t to = head > 0 && head < end - begin ? begin + head : end;
    for (; begin < end; begin = to, to = end)
      CPU_CAPABILITY::for_each_vector<L::size, hot>(begin, to, body);
  }
};
// Whether rows of n elements should be streamed: not if they have few whole vectors.
template <class L, class scalar_t>
FASTOPS_FN bool streams_rows(const scalar_t* out, int64_t rows, int64_t n, const void* in) {
  return out && n >= 16 * L::size && streams<L>(out, rows * n, in);
}

// A thread's exponentials of a row. They go into the result until it is computed from them; if that
// is too narrow, or is streamed, the thread allocates memory for them.
template <class L>
struct ExpScratch {
  using real = typename L::real;
  real* own = nullptr;

  FASTOPS_FN ExpScratch(int64_t n, bool streamed) {
    if (L::reduced || streamed)
      own = static_cast<real*>(std::aligned_alloc(64, (n * sizeof(real) + 63) / 64 * 64));
  }
  // Null if there is no memory: the exponentials are then computed again.
  template <class scalar_t>
  FASTOPS_FN real* beside(scalar_t* row) const {
    if constexpr (!L::reduced)
      if (!own) return row;
    return own;
  }
  // Not a destructor: unwinding needs a weak symbol, which instruction sets would share.
  FASTOPS_FN void free() const { std::free(own); }
};

template <class L, class scalar_t>
FASTOPS_FN typename L::real peak_of(const scalar_t* row, int64_t begin, int64_t end) {
  using real = typename L::real;
  using V = typename L::V;
  constexpr real lowest = -std::numeric_limits<real>::infinity();
  constexpr int64_t four = 4 * L::size;
  V peak[4] = {V(lowest), V(lowest), V(lowest),
               V(lowest)};  // four chains, since a maximum waits for the one before
  int64_t i = begin;
  for (; i + four <= end; i += four) {
    for (int j = 0; j < 4; ++j) {
      V x[L::count];
      L::load(row + i + j * L::size, L::size, x);
      for (int k = 0; k < L::count; ++k) peak[j] = larger(x[k], peak[j]);
    }
  }
  each_group<L>(row, i, end, [&](int64_t, auto n, auto& x) {
    if (n < L::size) L::mask_tail(n, lowest, x);
    for (int k = 0; k < L::count; ++k) peak[0] = larger(x[k], peak[0]);
  });
  return max_lanes(larger(larger(peak[0], peak[1]), larger(peak[2], peak[3])));
}

// The maximum of a row, the sum of exp(x - peak), and the running maximum at each block.
template <class real>
struct OnlineSoftmax {
  int64_t block;
  real peak = -std::numeric_limits<real>::infinity();
  double sum = 0;
  real known[kMaxBlocks];
};

// Is called during online_softmax(): block(base) when a block begins, group(i, count, x) with each
// vector's elements, done() when the block ends.
struct NoVisitor {
  template <class real>
  FASTOPS_FN void block(real) {}
  template <class Count, class X>
  FASTOPS_FN void group(int64_t, Count, const X&) {}
  FASTOPS_FN void done() {}
};

// The maximum of the first block of a row. Taken one row ahead, so that the processor has work
// while it reduces the sums of the row before.
template <class L, class scalar_t>
FASTOPS_FN typename L::real first_peak(const scalar_t* row, int64_t n) {
  const int64_t block = block_of(n);
  return peak_of<L>(row, 0, n < block ? n : block);
}

// If `exponential` is given, exp(x - known[block]) is stored there, in real. `first` is the row's
// first_peak() and becomes that of the `next` row, if there is one.
template <class L, class scalar_t, class real, class Visitor = NoVisitor>
FASTOPS_FN void online_softmax(const scalar_t* row, int64_t n, real& first, const scalar_t* next,
                               real* exponential, OnlineSoftmax<real>& v, Visitor&& visitor = {}) {
  using V = typename L::V;
  constexpr int many = kUnroll / L::count;  // vectors whose exponentials are taken at once
  v.block = block_of(n);
  v.peak = -std::numeric_limits<real>::infinity();
  v.sum = 0;
  for (int64_t begin = 0, b = 0; begin < n; begin += v.block, ++b) {
    const int64_t end = begin + v.block < n ? begin + v.block : n;
    const real peak = begin == 0 ? first : max(v.peak, peak_of<L>(row, begin, end)),
               base = LogSumExp<real>::origin(peak);
    if (begin > 0) v.sum *= static_cast<double>(exp(v.peak - base));
    v.peak = v.known[b] = peak;
    const V shift(base);
    V sum[kUnroll] = {V(real(0)), V(real(0)), V(real(0)), V(real(0))};
    visitor.block(base);
    // Adds the exponentials of `several` vectors of `count` elements each.
    const auto add = [&](int64_t i, auto several, auto count) {
      V x[several][L::count];
      for (int g = 0; g < several; ++g) {
        L::load(row + i + g * L::size, count, x[g]);
        __builtin_prefetch(row + i + g * L::size +
                           v.block);  // the next block, or of shorter rows one that follows
        visitor.group(i + g * L::size, count, x[g]);
        for (auto& u : x[g]) u = u - shift;
      }
      exp(x);
      for (int g = 0; g < several; ++g) {
        if (exponential) store_real<L>(exponential + i + g * L::size, count, x[g]);
        if (count < L::size) L::mask_tail(count, 0, x[g]);
        for (int k = 0; k < L::count; ++k) sum[g * L::count + k] = sum[g * L::count + k] + x[g][k];
      }
    };
    constexpr std::integral_constant<int, 1> one;
    int64_t i = begin;
    for (; i + many * L::size <= end; i += many * L::size)
      add(i, std::integral_constant<int, many>{}, std::integral_constant<int64_t, L::size>{});
    for_each_vector<L::size>(i, end, [&](int64_t at, auto count) { add(at, one, count); });
    v.sum += sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    visitor.done();
  }
  if (next) first = first_peak<L>(next, n);
}

// Calls body(i, count, e, rescale) for each vector of the row, cut as `out` wants them; e rescale
// is exp(x - v.peak). e comes from what online_softmax() stored, or is computed if it stored
// nothing.
template <class L, class scalar_t, class real, class Body>
FASTOPS_FN void each_exponential(const scalar_t* row, const real* exponential,
                                 const Out<L, scalar_t>& out, int64_t n,
                                 const OnlineSoftmax<real>& v, Body body) {
  using V = typename L::V;
  const real base = LogSumExp<real>::origin(v.peak);
  for (int64_t begin = 0, b = 0; begin < n; begin += v.block, ++b) {
    const int64_t end = begin + v.block < n ? begin + v.block : n;
    if (!L::reduced || exponential) {
      const V rescale(v.known[b] == v.peak ? real(1) : exp(v.known[b] - base));
      out.for_each_vector(begin, end, [&](int64_t i, auto count) {
        V e[L::count];
        load_real<L>(exponential + i, count, e);
        body(i, count, e, rescale);
      });
    } else if constexpr (L::reduced) {
      out.template for_each_vector<false>(begin, end, [&](int64_t i, auto count) {
        V x[L::count];
        L::load(row + i, count, x);
        for (int k = 0; k < L::count; ++k) x[k] = exp(x[k] - V(base));
        body(i, count, x, V(real(1)));
      });
    }
  }
}

}  // namespace
}  // namespace fastops::CPU_CAPABILITY
