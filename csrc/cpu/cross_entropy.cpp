// Softmax, log-softmax and cross-entropy over the middle dimension of (outer, n, inner). Where
// inner is 1 a row is contiguous and walked in blocks that stay in the first-level cache, with a
// running maximum per block, so that memory is read once; elsewhere a vector holds neighbouring
// rows and walks them all together.
#include <cstdlib>
#include <cstring>

#include "../formulas/cross_entropy.h"
#include "../kernels/cross_entropy.h"
#include "../kernels/softmax.h"
#include "parallel.h"
#include "vec_io.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 16384;    // elements a thread takes at least
constexpr int64_t kMaxBlocks = 256;  // of one row
constexpr int64_t kMinBlock = 2048;  // elements

constexpr int kUnroll = 4;  // vectors of a contiguous row whose exponentials are taken at once

// Adds v to sum and keeps what was rounded away (Kahan, 1965), unless the sum is not finite.
template <class T>
FASTOPS_FN void add_compensated(T& sum, T& lost, T v) {
  const T y = v - lost, t = sum + y, error = (t - sum) - y, none = c<T>(0);
  lost = select(error <= none, error, select(error > none, error, none));
  sum = t;
}

FASTOPS_FN int64_t block_of(int64_t n) {
  const int64_t least = (n + kMaxBlocks - 1) / kMaxBlocks;
  return least <= kMinBlock ? kMinBlock : (least + 63) / 64 * 64;
}
FASTOPS_FN int64_t rows_per_thread(int64_t n) { return n >= kGrain ? 1 : kGrain / (n < 1 ? 1 : n); }

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

// Calls body(i, n, x) with x loaded from `row` for every group of [begin, end).
template <class L, class scalar_t, class Body>
FASTOPS_FN void each_group(const scalar_t* row, int64_t begin, int64_t end, Body body) {
  for_each_vector<L::size>(begin, end, [&](int64_t i, auto n) {
    typename L::V x[L::count];
    L::load(row + i, n, x);
    body(i, n, x);
  });
}

// Where the results of a row go, past the caches or not. A row that is streamed is walked so that
// its vectors are aligned: the first of each block ends after `head` elements.
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
// Whether rows of n elements should be streamed: not where most of their vectors would not be
// whole.
template <class L, class scalar_t>
FASTOPS_FN bool streams_rows(const scalar_t* out, int64_t rows, int64_t n, const void* in) {
  return out && n >= 16 * L::size && streams<L>(out, rows * n, in);
}

// The exponentials of a row, where a thread keeps them: in memory of its own where they cannot be
// left in the result, which is too narrow for them or is not to come near the caches.
template <class L>
struct ExpScratch {
  using real = typename L::real;
  real* own = nullptr;

  FASTOPS_FN ExpScratch(int64_t n, bool streamed) {
    if (L::reduced || streamed)
      own = static_cast<real*>(std::aligned_alloc(64, (n * sizeof(real) + 63) / 64 * 64));
  }
  // Null where there is no memory for them.
  template <class scalar_t>
  FASTOPS_FN real* beside(scalar_t* row) const {
    if constexpr (!L::reduced)
      if (!own) return row;
    return own;
  }
  // Not a destructor: to unwind one takes a symbol that instruction sets would share.
  FASTOPS_FN void free() const { std::free(own); }
};

template <class L, class scalar_t>
FASTOPS_FN typename L::real peak_of(const scalar_t* row, int64_t begin, int64_t end) {
  using real = typename L::real;
  using V = typename L::V;
  constexpr real lowest = -std::numeric_limits<real>::infinity();
  constexpr int64_t four = 4 * L::size;
  V peak[4] = {V(lowest), V(lowest), V(lowest),
               V(lowest)};  // four chains of maxima, which would else wait for each other
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

// What one visit of a contiguous row leaves: its maximum, the sum of exp(x - peak), and the maximum
// each block knew.
template <class real>
struct OnlineSoftmax {
  int64_t block;
  real peak = -std::numeric_limits<real>::infinity();
  double sum = 0;
  real known[kMaxBlocks];
};

// Sees every group of a visit: block(base) before those of a block, group(i, count, x), done()
// after them.
struct NoVisitor {
  template <class real>
  FASTOPS_FN void block(real) {}
  template <class Count, class X>
  FASTOPS_FN void group(int64_t, Count, const X&) {}
  FASTOPS_FN void done() {}
};

// The maximum of the first block of a row. Rows that follow each other are best seen one ahead: a
// processor has the next row's maximum to look for while the sums of the row before it are joined.
template <class L, class scalar_t>
FASTOPS_FN typename L::real first_peak(const scalar_t* row, int64_t n) {
  const int64_t block = block_of(n);
  return peak_of<L>(row, 0, n < block ? n : block);
}

// Where `exponential` is given, exp(x - known[block]) is left there, in real. `first` is the row's
// first_peak(), and becomes that of the `next` row, where there is one.
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

// Calls body(i, count, e, rescale) with e rescale = exp(x - v.peak) for every group of the row, as
// `out` wants them: from the exponentials that online_softmax() left, or from x where it left none.
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

// ------------------------------------------------------------------------------------------------
// softmax

// `first` and `next` as of online_softmax().
template <class Op, class L, class scalar_t, class real>
FASTOPS_FN void softmax_row(const scalar_t* x, const Out<L, scalar_t>& y,
                            const ExpScratch<L>& scratch, int64_t n, real& first,
                            const scalar_t* next) {
  using V = typename L::V;
  OnlineSoftmax<real> v;
  real* const exponential = Op::from_exponential ? scratch.beside(y.row) : nullptr;
  online_softmax<L>(x, n, first, next, exponential, v);
  const V k(Op::constant(static_cast<real>(v.sum))), peak(v.peak);
  if constexpr (Op::from_exponential) {
    each_exponential<L>(x, exponential, y, n, v, [&](int64_t i, auto count, auto& e, V rescale) {
      for (int j = 0; j < L::count; ++j) e[j] = Op::forward(e[j] * rescale, peak, k);
      y.store(i, count, e);
    });
  } else {
    y.for_each_vector(0, n, [&](int64_t i, auto count) {
      V u[L::count];
      L::load(x + i, count, u);
      for (int j = 0; j < L::count; ++j) u[j] = Op::forward(u[j], peak, k);
      y.store(i, count, u);
    });
  }
}

template <class Op, class L, class scalar_t>
FASTOPS_FN void softmax_row_backward(const scalar_t* y, const scalar_t* dy,
                                     const Out<L, scalar_t>& dx, int64_t n) {
  using real = typename L::real;
  using V = typename L::V;
  double total = 0;
  [[maybe_unused]] PromotedSum<V> wide;
  for (int64_t begin = 0; begin < n; begin += kMinBlock) {
    V sum(real(0));
    each_group<L>(y, begin, begin + kMinBlock < n ? begin + kMinBlock : n,
                  [&](int64_t i, auto count, auto& vy) {
                    V g[L::count];
                    L::load(dy + i, count, g);
                    for (int j = 0; j < L::count; ++j) g[j] = Op::summand(vy[j], g[j]);
                    if (count < L::size) L::mask_tail(count, 0, g);
                    for (int j = 0; j < L::count; ++j) {
                      if constexpr (Op::cancels) {
                        wide.add(g[j]);
                      } else {
                        sum = sum + g[j];
                      }
                    }
                  });
    total += sum_of_lanes(sum);
  }
  if constexpr (Op::cancels) total = wide.total();
  const V all(static_cast<real>(total));
  dx.for_each_vector(0, n, [&](int64_t i, auto count) {
    V vy[L::count], g[L::count];
    L::load(y + i, count, vy);
    L::load(dy + i, count, g);
    for (int j = 0; j < L::count; ++j) g[j] = Op::backward(vy[j], g[j], all);
    dx.store(i, count, g);
  });
}

// Neighbouring rows, as many as a vector has lanes or fewer: element j of each is beside the
// others' at j inner. Rows that are short enough are kept side by side while they are worked on;
// their elements in memory may be apart by a power of two, and push each other out of the caches.
template <class L, class scalar_t>
struct StridedRows {
  using V = typename L::V;
  const scalar_t* x;
  int64_t inner, count;
  typename L::real* scratch;  // what was read, or what has taken its place; or null
  bool tiled;                 // RowTile has read them, and will write them

  FASTOPS_FN void save(int64_t j, const V (&v)[L::count]) const {
    for (int k = 0; k < L::count; ++k) v[k].store(scratch + j * L::size + k * V::size());
  }
  FASTOPS_FN void load_scratch(int64_t j, V (&v)[L::count]) const {
    for (int k = 0; k < L::count; ++k) v[k] = V::loadu(scratch + j * L::size + k * V::size());
  }
  FASTOPS_FN void load_first(int64_t j, V (&v)[L::count]) const {
    if (tiled) return load_scratch(j, v);
    L::load(x + j * inner, count, v);
    if (scratch) save(j, v);
  }
  FASTOPS_FN void load(int64_t j, V (&v)[L::count]) const {
    if (scratch) return load_scratch(j, v);
    L::load(x + j * inner, count, v);
  }
  FASTOPS_FN void store(int64_t j, const V (&v)[L::count], scalar_t* y) const {
    if (tiled) return save(j, v);
    L::store(y + j * inner, count, v);
  }
  // The maximum of each row, or what is left of it where there is a NaN, which shows in the sums.
  FASTOPS_FN void peaks(int64_t n, V (&peak)[L::count]) const {
    for (auto& p : peak) p = V(-std::numeric_limits<typename L::real>::infinity());
    for (int64_t j = 0; j < n; ++j) {
      V u[L::count];
      load_first(j, u);
      for (int k = 0; k < L::count; ++k) peak[k] = larger(u[k], peak[k]);
    }
  }
  // The sums of exp(x - base), which takes the place of x where it is scratch and `left`.
  template <bool left>
  FASTOPS_FN void exponentials(int64_t n, const V (&base)[L::count], V (&sum)[L::count]) const {
    for (auto& s : sum) s = V(typename L::real(0));
    if (scratch) {
      add_exponentials<left>(n, base, sum, [&](int64_t j, V(&v)[L::count]) { load_scratch(j, v); });
    } else {
      add_exponentials<false>(
          n, base, sum, [&](int64_t j, V(&v)[L::count]) { L::load(x + j * inner, count, v); });
    }
  }
  template <bool left, class Read>
  FASTOPS_FN void add_exponentials(int64_t n, const V (&base)[L::count], V (&sum)[L::count],
                                   Read read) const {
    constexpr int several = kUnroll / L::count;
    in_runs(n, [&](int64_t begin, int64_t end) {
      V few[L::count];
      for (auto& f : few) f = V(typename L::real(0));
      const auto add = [&](int64_t j, auto elements) {
        V u[elements][L::count];
        for (int c = 0; c < elements; ++c) {
          read(j + c, u[c]);
          for (int k = 0; k < L::count; ++k) u[c][k] = u[c][k] - base[k];
        }
        exp(u);
        for (int c = 0; c < elements; ++c) {
          if constexpr (left) save(j + c, u[c]);
          for (int k = 0; k < L::count; ++k) few[k] = few[k] + u[c][k];
        }
      };
      int64_t j = begin;
      for (; j + several <= end; j += several) add(j, std::integral_constant<int, several>{});
      for (; j < end; ++j) add(j, std::integral_constant<int, 1>{});
      for (int k = 0; k < L::count; ++k) sum[k] = sum[k] + few[k];
    });
  }
  // exp(x - base), of which exponentials() has left what is scratch.
  FASTOPS_FN void exponential(int64_t j, const V (&base)[L::count], V (&v)[L::count]) const {
    load(j, v);
    if (scratch) return;
    for (int k = 0; k < L::count; ++k) v[k] = exp(v[k] - base[k]);
  }
};

// StridedRows beside each other: where their elements are far apart many, which are read and
// written a run at a time, else those of one vector.
template <class L, class scalar_t>
struct RowTile {
  using V = typename L::V;
  using real = typename L::real;
  static constexpr int64_t kNear =
      (64 << 10) / static_cast<int64_t>(sizeof(real));  // reals that are kept on the stack
  static constexpr int64_t kTiled =
      (128 << 10) / static_cast<int64_t>(sizeof(real));  // and in a tile
  static constexpr int64_t kAhead =
      2;  // runs ahead that are asked for: a processor by itself stops at the end of a page
  const scalar_t* x;
  int64_t n, inner, count;
  real* tile;  // or null
  alignas(64) real near[kNear];

  // How many rows of n elements make a tile.
  static FASTOPS_FN int64_t rows_per_tile(int64_t n, int64_t inner) {
    constexpr int64_t kPage = 4096, kFar = 2 << 20;  // bytes
    const int64_t stride = inner * static_cast<int64_t>(sizeof(scalar_t)),
                  most = kTiled / (n * L::size);
    if (n < 16 || most < 4 || (stride % kPage != 0 && n * stride < kFar)) return L::size;
    return L::size * (most < 16 ? most : 16);
  }
  FASTOPS_FN RowTile(const scalar_t* x, int64_t n, int64_t inner, int64_t count, real* memory)
      : x(x), n(n), inner(inner), count(count), tile(memory) {
    if (!tile) return;
    for (int64_t j = 0; j < n; ++j)
      each([&](int64_t i, const StridedRows<L, scalar_t>& c) {
        V v[L::count];
        L::load(x + j * inner + i, c.count, v);
        __builtin_prefetch(x + (j + kAhead) * inner + i);
        c.save(j, v);
      });
  }
  FASTOPS_FN StridedRows<L, scalar_t> columns(int64_t i) {
    real* const scratch = tile ? tile + n * i : n * L::size <= kNear ? near : nullptr;
    return {x + i, inner, count - i < L::size ? count - i : L::size, scratch, tile != nullptr};
  }
  // Calls body(i, the StridedRows from row i on) for all.
  template <class Body>
  FASTOPS_FN void each(Body body) {
    for (int64_t i = 0; i < count; i += L::size) body(i, columns(i));
  }
  // Writes what the StridedRows have left.
  FASTOPS_FN void write(scalar_t* y) {
    if (!tile) return;
    for (int64_t j = 0; j < n; ++j)
      each([&](int64_t i, const StridedRows<L, scalar_t>& c) {
        V v[L::count];
        c.load_scratch(j, v);
        __builtin_prefetch(y + (j + kAhead) * inner + i, 1);
        L::store(y + j * inner + i, c.count, v);
      });
  }
};

template <class Op, class L, class scalar_t>
FASTOPS_FN void softmax_columns(const scalar_t* x, scalar_t* y, int64_t n, int64_t inner,
                                int64_t count, typename L::real* memory) {
  using V = typename L::V;
  RowTile<L, scalar_t> tile(x, n, inner, count, memory);
  tile.each([&](int64_t i, const StridedRows<L, scalar_t>& c) {
    V peak[L::count], sum[L::count];
    c.peaks(n, peak);
    c.template exponentials<Op::from_exponential>(n, peak, sum);
    for (auto& s : sum) s = Op::constant(s);
    for (int64_t j = 0; j < n; ++j) {
      V u[L::count];
      if constexpr (Op::from_exponential) {
        c.exponential(j, peak, u);
      } else {
        c.load(j, u);
      }
      for (int k = 0; k < L::count; ++k) u[k] = Op::forward(u[k], peak[k], sum[k]);
      c.store(j, u, y + i);
    }
  });
  tile.write(y);
}

template <class Op, class L, class scalar_t>
FASTOPS_FN void softmax_columns_backward(const scalar_t* y, const scalar_t* dy, scalar_t* dx,
                                         int64_t n, int64_t inner, int64_t count,
                                         typename L::real* memory) {
  using V = typename L::V;
  RowTile<L, scalar_t> outputs(y, n, inner, count, memory);
  RowTile<L, scalar_t> gradients(dy, n, inner, count,
                                 memory ? memory + RowTile<L, scalar_t>::kTiled : nullptr);
  gradients.each([&](int64_t i, const StridedRows<L, scalar_t>& gradient) {
    const StridedRows<L, scalar_t> output = outputs.columns(i);
    V total[L::count];
    for (auto& t : total) t = V(typename L::real(0));
    in_runs(n, [&](int64_t begin, int64_t end) {
      V sum[L::count];
      for (auto& s : sum) s = V(typename L::real(0));
      for (int64_t j = begin; j < end; ++j) {
        V u[L::count], g[L::count];
        output.load_first(j, u);
        gradient.load_first(j, g);
        for (int k = 0; k < L::count; ++k) sum[k] = sum[k] + Op::summand(u[k], g[k]);
      }
      for (int k = 0; k < L::count; ++k) total[k] = total[k] + sum[k];
    });
    for (int64_t j = 0; j < n; ++j) {
      V u[L::count], g[L::count];
      output.load(j, u);
      gradient.load(j, g);
      for (int k = 0; k < L::count; ++k) g[k] = Op::backward(u[k], g[k], total[k]);
      gradient.store(j, g, dx + i);
    }
  });
  gradients.write(dx);
}

// Runs `rows(begin, end)` for ranges of contiguous rows, or over the threads `columns(o, i, count,
// memory)` for neighbouring rows, those of a RowTile, with memory for `tiles` of them where it is
// to be one.
template <class L, int tiles, class scalar_t, class RowsBody, class ColumnsBody>
FASTOPS_FN void over_rows(int64_t outer, int64_t n, int64_t inner, const scalar_t*, RowsBody rows,
                          ColumnsBody columns) {
  if (inner == 1) {
    cpu::parallel(outer, rows_per_thread(n), rows);
  } else {
    using T = RowTile<L, scalar_t>;
    const int64_t rows_per_tile = T::rows_per_tile(n, inner),
                  across = (inner + rows_per_tile - 1) / rows_per_tile;
    cpu::parallel(
        outer * across, rows_per_thread(n * rows_per_tile), [=](int64_t begin, int64_t end) {
          constexpr size_t bytes = tiles * T::kTiled * sizeof(typename L::real);
          auto* const memory = static_cast<typename L::real*>(
              rows_per_tile > L::size ? std::aligned_alloc(64, bytes) : nullptr);
          const int64_t step = memory ? rows_per_tile : L::size;
          for (int64_t t = begin; t < end; ++t) {
            const int64_t left = t % across * rows_per_tile,
                          right = left + rows_per_tile < inner ? left + rows_per_tile : inner;
            for (int64_t i = left; i < right; i += step)
              columns(t / across, i, right - i < step ? right - i : step, memory);
          }
          std::free(memory);
        });
  }
}

template <class Op>
struct MakeSoftmax {
  static Error forward(const SoftmaxArgs& a) {
    return dispatch(a.dtype, [&](auto zero) -> Error {
      using scalar_t = decltype(zero);
      using L = VecIO<scalar_t>;
      auto* x = static_cast<const scalar_t*>(a.in[0]);
      auto* y = static_cast<scalar_t*>(a.out);
      const int64_t n = a.n, inner = a.inner;
      const bool streamed = streams_rows<L>(y, a.outer, n, x);
      over_rows<L, 1>(
          a.outer, n, inner, x,
          [=](int64_t begin, int64_t end) {
            const ExpScratch<L> scratch(Op::from_exponential ? n : 0,
                                        Op::from_exponential && streamed);
            auto first = first_peak<L>(x + begin * n, n);
            for (int64_t r = begin; r < end; ++r)
              softmax_row<Op, L>(x + r * n, Out<L, scalar_t>(y, r, n, streamed), scratch, n, first,
                                 r + 1 < end ? x + (r + 1) * n : nullptr);
            if (streamed) fence();
            scratch.free();
          },
          [=](int64_t o, int64_t i, int64_t count, typename L::real* memory) {
            const int64_t at = o * n * inner + i;
            softmax_columns<Op, L>(x + at, y + at, n, inner, count, memory);
          });
      return nullptr;
    });
  }
  static Error backward(const SoftmaxArgs& a) {
    return dispatch(a.dtype, [&](auto zero) -> Error {
      using scalar_t = decltype(zero);
      using L = VecIO<scalar_t>;
      auto* y = static_cast<const scalar_t*>(a.in[0]);
      auto* dy = static_cast<const scalar_t*>(a.in[1]);
      auto* dx = static_cast<scalar_t*>(a.out);
      const int64_t n = a.n, inner = a.inner;
      const bool streamed = dx != y && streams_rows<L>(dx, a.outer, n, dy);
      over_rows<L, 2>(
          a.outer, n, inner, y,
          [=](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r)
              softmax_row_backward<Op, L>(y + r * n, dy + r * n,
                                          Out<L, scalar_t>(dx, r, n, streamed), n);
            if (streamed) fence();
          },
          [=](int64_t o, int64_t i, int64_t count, typename L::real* memory) {
            const int64_t at = o * n * inner + i;
            softmax_columns_backward<Op, L>(y + at, dy + at, dx + at, n, inner, count, memory);
          });
      return nullptr;
    });
  }
  static constexpr SoftmaxKernel row{Op::name, &forward, &backward};
};

// ------------------------------------------------------------------------------------------------
// cross-entropy

// The constants of a call, in real.
constexpr int kMaxTargets = 2;
template <class real>
struct Target {
  int targets;  // classes that a row is compared with
  const int64_t* index[kMaxTargets];
  real share[kMaxTargets];  // of the targets in the loss, where there are two
  const real* weight;
  int64_t ignore_index;
  real smoothing, soft, scale,
      mass;  // soft = smoothing / n; scale of the gradient; mass = sum of the weights
  real z;
  real* lse;

  FASTOPS_FN Target(const CrossEntropyArgs& a)
      : targets(a.second_target ? 2 : 1),
        index{a.target, a.second_target},
        share{part(a.lam, a.divisor), part(1 - a.lam, a.second_divisor)},
        weight(static_cast<const real*>(a.weight)),
        ignore_index(a.ignore_index),
        smoothing(static_cast<real>(a.label_smoothing)),
        soft(static_cast<real>(a.label_smoothing / static_cast<double>(a.n))),
        scale(a.second_target ? static_cast<real>(a.scale) : part(a.scale, a.divisor)),
        mass(soft == real(0) ? real(0) : static_cast<real>(a.n)),
        z(static_cast<real>(a.z_loss)),
        lse(static_cast<real*>(a.lse)) {
    if (weight && soft != real(0)) {
      double sum = 0;
      for (int64_t j = 0; j < a.n; ++j) sum += static_cast<double>(weight[j]);
      mass = static_cast<real>(sum);
    }
  }
  static FASTOPS_FN real part(double whole, const void* divisor) {
    return static_cast<real>(
        divisor ? whole / static_cast<double>(*static_cast<const real*>(divisor)) : whole);
  }
  FASTOPS_FN real hard(int64_t t) const {
    return (real(1) - smoothing) * (weight ? weight[t] : real(1));
  }
  // Leaves row r's log(sum(exp(x))), adds what z_loss makes of it to the row's loss, and returns
  // what it adds to `total`.
  FASTOPS_FN real finish(int64_t r, real peak, real log_sum, real& loss) const {
    const real value = peak + log_sum;
    if (lse) lse[r] = value;
    if (z == real(0)) return real(0);
    loss = loss + CrossEntropy::z_loss(value, z);
    return CrossEntropy::z_slope(value, z);
  }
};

// What the classes of `lanes` neighbouring rows ask of their kernel; a class that is ignored is -1.
template <class real, int64_t lanes>
struct Classes {
  int64_t t[kMaxTargets][lanes];
  real hard[kMaxTargets][lanes] = {}, x[kMaxTargets][lanes] = {};  // x: the logits of the classes
  real share[lanes] = {}, nothing[lanes] = {},
       live[lanes] = {};  // share: what the classes not ignored are of the loss

  // Of `count` rows from row r on, whose logits are at `logits`, those of class j behind each other
  // at j stride.
  template <class scalar_t>
  FASTOPS_FN Classes(const Target<real>& q, int64_t r, int64_t count, const scalar_t* logits,
                     int64_t stride) {
    if (count == lanes) {
      read(q, r, std::integral_constant<int64_t, lanes>{}, logits, stride);
    } else {
      read(q, r, count, logits, stride);
    }
  }
  template <class scalar_t, class N>
  FASTOPS_FN void read(const Target<real>& q, int64_t r, N count, const scalar_t* logits,
                       int64_t stride) {
    for (int m = 0; m < q.targets; ++m) {
      const real part = q.targets == 1 ? real(1) : q.share[m],
                 keep = part * (real(1) - q.smoothing);
      bool all = true;  // most often: then the loops over lanes have no branches
      for (int64_t i = 0; i < count; ++i) t[m][i] = q.index[m][r + i];
      for (int64_t i = 0; i < count; ++i) all &= t[m][i] != q.ignore_index;
      if (all) {
        for (int64_t i = 0; i < count; ++i)
          x[m][i] = static_cast<real>(logits[t[m][i] * stride + i]);
        for (int64_t i = 0; i < count; ++i) hard[m][i] = keep;
        for (int64_t i = 0; i < count; ++i) share[i] += part;
        for (int64_t i = 0; i < count; ++i) live[i] = 1;
      } else {
        for (int64_t i = 0; i < count; ++i) {
          if (t[m][i] == q.ignore_index) {
            t[m][i] = -1;
            if (q.targets > 1) nothing[i] += real(0) * part;  // the mean of none is NaN
            continue;
          }
          x[m][i] = static_cast<real>(logits[t[m][i] * stride + i]);
          hard[m][i] = keep;
          share[i] += part;
          live[i] = 1;
        }
      }
      if (q.weight)
        for (int64_t i = 0; i < count; ++i)
          if (t[m][i] >= 0) hard[m][i] = part * q.hard(t[m][i]);
    }
  }
  // What is subtracted from the gradient where lane i's target m is, which both may be.
  FASTOPS_FN real own(const Target<real>& q, int m, int64_t i) const {
    return q.targets == 2 && t[0][i] == t[1][i] ? hard[0][i] + hard[1][i] : hard[m][i];
  }
};

// `first` and `next` as of online_softmax().
template <class L, class scalar_t, class real>
FASTOPS_FN void cross_entropy_row(const scalar_t* x, const Out<L, scalar_t>& grad,
                                  const ExpScratch<L>& scratch, real* loss, int64_t n, int64_t r,
                                  const Target<real>& q, real& first, const scalar_t* next) {
  using V = typename L::V;
  constexpr int64_t one = 1;
  const Classes<real, 1> of(q, r, one, x, 1);  // before grad, which may be x, is written
  if (of.live[0] == real(0)) {
    *loss = of.nothing[0];
    if (q.lse) q.lse[r] = 0;
    if (grad.row) {
      V none[L::count];
      for (auto& v : none) v = V(real(0));
      grad.template for_each_vector<false>(
          0, n, [&](int64_t i, auto count) { grad.store(i, count, none); });
    }
    if (next) first = first_peak<L>(next, n);
    return;
  }
  real smooth_depth = 0;
  OnlineSoftmax<real> v;
  if (q.soft != real(0)) {
    const real peak = n <= block_of(n) ? first : peak_of<L>(x, 0, n);
    double depth = 0;
    constexpr int64_t run = kFew * L::size;
    for (int64_t begin = 0; begin < n; begin += kMinBlock) {
      const int64_t end = begin + kMinBlock < n ? begin + kMinBlock : n;
      V sum(real(0));
      for (int64_t from = begin; from < end; from += run) {
        V few(real(0));
        each_group<L>(x, from, from + run < end ? from + run : end,
                      [&](int64_t i, auto count, auto& u) {
                        for (int k = 0; k < L::count; ++k) u[k] = V(peak) - u[k];
                        if (q.weight) {
                          V w[L::count];
                          load_real<L>(q.weight + i, count, w);
                          for (int k = 0; k < L::count; ++k) u[k] = u[k] * w[k];
                        }
                        if (count < L::size) L::mask_tail(count, 0, u);
                        for (int k = 0; k < L::count; ++k) few = few + u[k];
                      });
        sum = sum + few;
      }
      depth += sum_of_lanes(sum);
    }
    smooth_depth = static_cast<real>(depth);
  }
  real* const exponential = grad.row ? scratch.beside(grad.row) : nullptr;
  online_softmax<L>(x, n, first, next, exponential, v);
  const real log_sum = static_cast<real>(log(v.sum));
  const real soft_part = of.share[0] * q.soft;
  real hard = 0;
  *loss = of.nothing[0];
  for (int m = 0; m < q.targets; ++m) {
    if (of.t[m][0] < 0) continue;
    hard += of.hard[m][0];
    *loss += CrossEntropy::loss(log_sum, v.peak, of.x[m][0], of.hard[m][0]);
  }
  if (q.soft != real(0))
    *loss = *loss + CrossEntropy::smooth_loss(log_sum, smooth_depth, q.mass, soft_part);
  const real slope = q.finish(r, v.peak, log_sum, *loss);
  if (!grad.row) return;

  const V inverse(static_cast<real>(1 / v.sum)),
      total((hard + soft_part * q.mass + slope) * q.scale), none(real(0));
  const V soft(soft_part * q.scale);
  // The gradient where a target is, whose share is subtracted before the value is rounded to the
  // dtype.
  V at_target[kMaxTargets][L::count];
  for (int m = 0; m < q.targets; ++m) {
    if (of.t[m][0] < 0) continue;
    const V p = exp(V(of.x[m][0]) - V(LogSumExp<real>::origin(v.peak))) * inverse;
    const V soft_weight = q.soft == real(0) ? none
                          : q.weight        ? soft * V(q.weight[of.t[m][0]])
                                            : soft;
    for (auto& g : at_target[m])
      g = CrossEntropy::gradient(p, total, soft_weight) - V(of.own(q, m, 0) * q.scale);
  }
  if (grad.streamed) {  // to change a value of it later it would have to be read again
    each_exponential<L>(x, exponential, grad, n, v, [&](int64_t i, auto count, auto& e, V rescale) {
      V w[L::count];
      if (q.weight) load_real<L>(q.weight + i, count, w);
      for (int k = 0; k < L::count; ++k)
        e[k] = CrossEntropy::gradient(e[k] * (rescale * inverse), total,
                                      q.soft == real(0) ? none
                                      : q.weight        ? soft * w[k]
                                                        : soft);
      for (int m = 0; m < q.targets; ++m)
        if (of.t[m][0] >= i && of.t[m][0] < i + count) L::put(of.t[m][0] - i, at_target[m], e);
      grad.store(i, count, e);
    });
    return;
  }
  if (q.soft == real(0)) {
    each_exponential<L>(x, exponential, grad, n, v, [&](int64_t i, auto count, auto& e, V rescale) {
      for (int k = 0; k < L::count; ++k)
        e[k] = CrossEntropy::gradient(e[k] * (rescale * inverse), total, none);
      grad.store(i, count, e);
    });
  } else {
    each_exponential<L>(x, exponential, grad, n, v, [&](int64_t i, auto count, auto& e, V rescale) {
      V w[L::count];
      if (q.weight) load_real<L>(q.weight + i, count, w);
      for (int k = 0; k < L::count; ++k)
        e[k] = CrossEntropy::gradient(e[k] * (rescale * inverse), total,
                                      q.weight ? soft * w[k] : soft);
      grad.store(i, count, e);
    });
  }
  for (int m = 0; m < q.targets; ++m)
    if (of.t[m][0] >= 0) L::store(grad.row + of.t[m][0], one, at_target[m]);
}

template <class L, class scalar_t, class real>
FASTOPS_FN void cross_entropy_columns(const StridedRows<L, scalar_t>& c, scalar_t* grad, real* loss,
                                      int64_t r, int64_t n, const Target<real>& q) {
  using V = typename L::V;
  constexpr int64_t size = L::size;
  const int64_t count = c.count;
  const Classes<real, size> of(q, r, count, c.x, c.inner);
  V peak[L::count], base[L::count], sum[L::count], depth[L::count];
  c.peaks(n, peak);
  for (int k = 0; k < L::count; ++k) base[k] = LogSumExp<V>::origin(peak[k]), depth[k] = V(real(0));
  if (q.soft != real(0)) {
    in_runs(n, [&](int64_t begin, int64_t end) {
      V deep[L::count];
      for (auto& d : deep) d = V(real(0));
      for (int64_t j = begin; j < end; ++j) {
        V u[L::count];
        c.load(j, u);
        const V w(q.weight ? q.weight[j] : real(1));
        for (int k = 0; k < L::count; ++k) deep[k] = deep[k] + w * (base[k] - u[k]);
      }
      for (int k = 0; k < L::count; ++k) depth[k] = depth[k] + deep[k];
    });
  }
  c.template exponentials<true>(n, base, sum);
  V inverse[L::count], total[L::count];
  real out[size], lse[size];
  const auto shared = [&](V v, int k) {  // what is the classes' part in it, where there are two
    if (q.targets == 2) v = v * V::loadu(of.share + k * V::size());
    return v;
  };
  for (int k = 0; k < L::count; ++k) {
    const V log_sum = log(sum[k]);
    V h = V::loadu(of.hard[0] + k * V::size());
    V value = CrossEntropy::loss(log_sum, peak[k], V::loadu(of.x[0] + k * V::size()), h);
    if (q.targets == 2) {
      const V second = V::loadu(of.hard[1] + k * V::size());
      value =
          value + CrossEntropy::loss(log_sum, peak[k], V::loadu(of.x[1] + k * V::size()), second);
      h = h + second;
    }
    if (q.soft != real(0))
      value = value + CrossEntropy::smooth_loss(log_sum, depth[k], V(q.mass), shared(V(q.soft), k));
    V slope(real(0));
    const V log_total = peak[k] + log_sum;
    if (q.z != real(0)) {
      value = value + CrossEntropy::z_loss(log_total, V(q.z));
      slope = CrossEntropy::z_slope(log_total, V(q.z));
    }
    value.store(out + k * V::size());
    log_total.store(lse + k * V::size());
    inverse[k] = V(real(1)) / sum[k];
    total[k] = (h + shared(V(q.soft * q.mass), k) + slope) * V(q.scale);
  }
  for (int64_t i = 0; i < count; ++i)
    loss[i] = (of.live[i] != real(0) ? out[i] : real(0)) + of.nothing[i];
  if (q.lse)
    for (int64_t i = 0; i < count; ++i) q.lse[r + i] = of.live[i] != real(0) ? lse[i] : real(0);
  if (!grad) return;
  bool all_live = true;
  for (int64_t i = 0; i < count; ++i) all_live &= of.live[i] != real(0);
  for (int64_t j = 0; j < n; ++j) {
    V u[L::count];
    c.exponential(j, base, u);
    const V soft_weight(q.soft == real(0) ? real(0)
                                          : q.soft * q.scale * (q.weight ? q.weight[j] : real(1)));
    for (int k = 0; k < L::count; ++k) {
      u[k] = CrossEntropy::gradient(u[k] * inverse[k], total[k], shared(soft_weight, k));
      if (!all_live)
        u[k] = select(V::loadu(of.live + k * V::size()) > V(real(0)), u[k], V(real(0)));
    }
    c.store(j, u, grad);
  }
  // As in cross_entropy_row(): where a target is, its share is subtracted before the value is
  // rounded.
  for (int m = 0; m < q.targets; ++m) {
    real soft_weight[size] = {}, both[size] = {};
    if (q.targets == 2)
      for (int64_t i = 0; i < count; ++i) both[i] = of.own(q, m, i);
    const real* const own = q.targets == 2 ? both : of.hard[m];
    if (q.soft != real(0))
      for (int64_t i = 0; i < count; ++i)
        if (of.t[m][i] >= 0)
          soft_weight[i] = q.soft * q.scale * (q.weight ? q.weight[of.t[m][i]] : real(1));
    V u[L::count];
    for (int k = 0; k < L::count; ++k) {
      const V p = exp(V::loadu(of.x[m] + k * V::size()) - base[k]) * inverse[k];
      u[k] = CrossEntropy::gradient(p, total[k], shared(V::loadu(soft_weight + k * V::size()), k)) -
             V::loadu(own + k * V::size()) * V(q.scale);
    }
    if (c.tiled) {
      real at_target[size];
      for (int k = 0; k < L::count; ++k) u[k].store(at_target + k * V::size());
      for (int64_t i = 0; i < count; ++i)
        if (of.t[m][i] >= 0) c.scratch[of.t[m][i] * size + i] = at_target[i];
    } else {
      scalar_t at_target[size];
      L::store(at_target, size, u);
      for (int64_t i = 0; i < count; ++i)
        if (of.t[m][i] >= 0) grad[of.t[m][i] * c.inner + i] = at_target[i];
    }
  }
}

// The distributions that rows are compared with: w (keep q + soft), for q of scalar_t.
template <class L, class scalar_t>
struct Distribution {
  using real = typename L::real;
  using V = typename L::V;
  const scalar_t* q;
  const real* weight;
  real keep, soft;

  FASTOPS_FN Distribution(const CrossEntropyArgs& a)
      : q(static_cast<const scalar_t*>(a.probability)),
        weight(static_cast<const real*>(a.weight)),
        keep(static_cast<real>(1 - a.label_smoothing)),
        soft(static_cast<real>(a.label_smoothing / static_cast<double>(a.n))) {}

  // Elements i and on of a row whose probabilities are at `row`; 0 behind the row's end.
  template <class N>
  FASTOPS_FN void load(const scalar_t* row, int64_t i, N count, V (&v)[L::count]) const {
    L::load(row + i, count, v);
    for (int k = 0; k < L::count; ++k) v[k] = v[k] * V(keep) + V(soft);
    if (weight) {
      V w[L::count];
      load_real<L>(weight + i, count, w);
      for (int k = 0; k < L::count; ++k) v[k] = v[k] * w[k];
    }
    if (count < L::size) L::mask_tail(count, 0, v);
  }
};

// Takes a row's Expectation in its visit.
template <class L, class scalar_t>
struct Expect {
  using real = typename L::real;
  using V = typename L::V;
  const Distribution<L, scalar_t>& distribution;
  const scalar_t* q;
  Expectation<double> row{};
  Expectation<V>
      lanes{};  // of the last kFew vectors: equal terms, added up one by one, would drift
  V mass{real(0)}, depth{real(0)};
  int pending = 0;

  FASTOPS_FN void block(real base) {
    row.move(static_cast<double>(base));
    lanes = {V(real(0)), V(real(0)), V(base)};
    mass = depth = V(real(0));
  }
  FASTOPS_FN void flush() {
    mass = mass + lanes.mass;
    depth = depth + lanes.depth;
    lanes.mass = lanes.depth = V(real(0));
    pending = 0;
  }
  template <class Count>
  FASTOPS_FN void group(int64_t i, Count count, const V (&x)[L::count]) {
    V w[L::count];
    distribution.load(q, i, count, w);
    for (int k = 0; k < L::count; ++k) lanes.add(w[k], x[k]);
    if (++pending == kFew) flush();
  }
  FASTOPS_FN void done() {
    flush();
    row.mass += sum_of_lanes(mass);
    row.depth += sum_of_lanes(depth);
  }
};

template <class L, class scalar_t, class real>
FASTOPS_FN void cross_entropy_row(const scalar_t* x, const scalar_t* q,
                                  const Out<L, scalar_t>& grad, const ExpScratch<L>& scratch,
                                  real* loss, int64_t n, int64_t r, const Target<real>& target,
                                  const Distribution<L, scalar_t>& distribution, real& first,
                                  const scalar_t* next) {
  using V = typename L::V;
  real* const exponential = grad.row ? scratch.beside(grad.row) : nullptr;
  OnlineSoftmax<real> v;
  Expect<L, scalar_t> expect{distribution, q};
  online_softmax<L>(x, n, first, next, exponential, v, expect);
  const real log_sum = static_cast<real>(log(v.sum));
  *loss = CrossEntropy::smooth_loss(log_sum, static_cast<real>(expect.row.depth),
                                    static_cast<real>(expect.row.mass), real(1));
  const real slope = target.finish(r, v.peak, log_sum, *loss), scale = target.scale;
  if (!grad.row) return;
  const V inverse(static_cast<real>(1 / v.sum)),
      total((static_cast<real>(expect.row.mass) + slope) * scale), by(scale);
  each_exponential<L>(x, exponential, grad, n, v, [&](int64_t i, auto count, auto& e, V rescale) {
    V w[L::count];
    distribution.load(q, i, count, w);
    for (int k = 0; k < L::count; ++k)
      e[k] = CrossEntropy::gradient(e[k] * (rescale * inverse), total, w[k] * by);
    grad.store(i, count, e);
  });
}

template <class L, class scalar_t, class real>
FASTOPS_FN void cross_entropy_columns(const StridedRows<L, scalar_t>& c, const scalar_t* q,
                                      scalar_t* grad, real* loss, int64_t n, int64_t r,
                                      const Target<real>& target,
                                      const Distribution<L, scalar_t>& distribution) {
  using V = typename L::V;
  const int64_t count = c.count;
  const V keep(distribution.keep), soft(distribution.soft), by(target.scale);
  const auto load = [&](int64_t j, V(&w)[L::count]) {
    L::load(q + j * c.inner, count, w);
    const V class_weight(distribution.weight ? distribution.weight[j] : real(1));
    for (int k = 0; k < L::count; ++k) w[k] = (w[k] * keep + soft) * class_weight;
  };
  V peak[L::count], base[L::count], sum[L::count];
  Expectation<V> of[L::count], lost[L::count];
  c.peaks(n, peak);
  for (int k = 0; k < L::count; ++k) base[k] = of[k].base = LogSumExp<V>::origin(peak[k]);
  in_runs(n, [&](int64_t begin, int64_t end) {
    Expectation<V> part[L::count];
    for (int k = 0; k < L::count; ++k) part[k].base = base[k];
    for (int64_t j = begin; j < end; ++j) {
      V u[L::count], w[L::count];
      c.load(j, u);
      load(j, w);
      for (int k = 0; k < L::count; ++k) part[k].add(w[k], u[k]);
    }
    for (int k = 0; k < L::count; ++k) {
      add_compensated(of[k].mass, lost[k].mass, part[k].mass);
      add_compensated(of[k].depth, lost[k].depth, part[k].depth);
    }
  });
  c.template exponentials<true>(n, base, sum);
  V inverse[L::count], total[L::count];
  real out[L::size], lse[L::size];
  for (int k = 0; k < L::count; ++k) {
    const V log_sum = log(sum[k]), log_total = peak[k] + log_sum;
    V value = CrossEntropy::smooth_loss(log_sum, of[k].depth, of[k].mass, V(real(1)));
    V all = of[k].mass;
    if (target.z != real(0)) {
      value = value + CrossEntropy::z_loss(log_total, V(target.z));
      all = all + CrossEntropy::z_slope(log_total, V(target.z));
    }
    value.store(out + k * V::size());
    log_total.store(lse + k * V::size());
    inverse[k] = V(real(1)) / sum[k];
    total[k] = all * by;
  }
  for (int64_t i = 0; i < count; ++i) loss[i] = out[i];
  if (target.lse)
    for (int64_t i = 0; i < count; ++i) target.lse[r + i] = lse[i];
  if (!grad) return;
  for (int64_t j = 0; j < n; ++j) {
    V u[L::count], w[L::count];
    c.exponential(j, base, u);
    load(j, w);
    for (int k = 0; k < L::count; ++k)
      u[k] = CrossEntropy::gradient(u[k] * inverse[k], total[k], w[k] * by);
    c.store(j, u, grad);
  }
}

// What the classes of some rows weigh, and the first row whose class is out of range. Doubles are
// added up with what rounding takes from them; floats lose nothing that shows.
struct TargetSum {
  double sum = 0, lost = 0;
  int64_t bad_row = -1;
  template <class real>
  FASTOPS_FN void add(double v) {
    if constexpr (std::is_same_v<real, double>) {
      add_compensated(sum, lost, v);
    } else {
      sum += v;
    }
  }
};
template <class real>
FASTOPS_FN TargetSum sum_targets(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
  TargetSum all;
  int64_t live = 0, bad = 0;  // counted without a branch, so that the loop is one of vectors
  for (int64_t r = begin; r < end; ++r) {
    const int64_t t = a.target[r], counts = t != a.ignore_index;
    live += counts;
    bad |= counts & static_cast<int64_t>(static_cast<uint64_t>(t) >= static_cast<uint64_t>(a.n));
  }
  if (bad) {
    for (all.bad_row = begin;; ++all.bad_row) {
      const int64_t t = a.target[all.bad_row];
      if (t != a.ignore_index && (t < 0 || t >= a.n)) return all;
    }
  }
  all.sum = static_cast<double>(live);
  if (!a.weight) return all;
  all.sum = 0;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t t = a.target[r];
    if (t != a.ignore_index) all.add<real>(static_cast<const real*>(a.weight)[t]);
  }
  return all;
}

template <class Op>
struct MakeCrossEntropy {
  static Error forward(const CrossEntropyArgs& a) { return over<false>(a); }
  static Error forward_probability(const CrossEntropyArgs& a) { return over<true>(a); }

  template <bool distributions>
  static Error over(const CrossEntropyArgs& a) {
    return dispatch(a.dtype, [&](auto zero) -> Error {
      using scalar_t = decltype(zero);
      using L = VecIO<scalar_t>;
      using real = typename L::real;
      const Target<real> target(a);
      const Distribution<L, scalar_t> distribution(a);
      auto* x = static_cast<const scalar_t*>(a.x);
      auto* grad = static_cast<scalar_t*>(a.grad);
      auto* loss = static_cast<real*>(a.loss);
      const int64_t n = a.n, inner = a.inner;
      const bool streamed = streams_rows<L>(grad, a.outer, n, x);
      over_rows<L, 1>(
          a.outer, n, inner, x,
          [=, &target, &distribution](int64_t begin, int64_t end) {
            const ExpScratch<L> scratch(grad ? n : 0, streamed);
            real first = first_peak<L>(x + begin * n, n);
            for (int64_t r = begin; r < end; ++r) {
              const Out<L, scalar_t> g(grad, r, n, streamed);
              const scalar_t* const next = r + 1 < end ? x + (r + 1) * n : nullptr;
              if constexpr (distributions) {
                cross_entropy_row<L>(x + r * n, distribution.q + r * n, g, scratch, loss + r, n, r,
                                     target, distribution, first, next);
              } else {
                cross_entropy_row<L>(x + r * n, g, scratch, loss + r, n, r, target, first, next);
              }
            }
            if (streamed) fence();
            scratch.free();
          },
          [=, &target, &distribution](int64_t o, int64_t i, int64_t count, real* memory) {
            const int64_t at = o * n * inner + i, r = o * inner + i;
            RowTile<L, scalar_t> tile(x + at, n, inner, count, memory);
            tile.each([&](int64_t k, const StridedRows<L, scalar_t>& c) {
              scalar_t* const g = grad ? grad + at + k : nullptr;
              if constexpr (distributions) {
                cross_entropy_columns<L>(c, distribution.q + at + k, g, loss + r + k, n, r + k,
                                         target, distribution);
              } else {
                cross_entropy_columns<L>(c, g, loss + r + k, r + k, n, target);
              }
            });
            if (grad) tile.write(grad + at);
          });
      return nullptr;
    });
  }

  // In chunks that the number of rows alone decides, which leave their sums in the part of `loss`
  // that is theirs; the last takes what is left as well.
  static Error divisor(const CrossEntropyArgs& a, void* divisor_out, int64_t* bad_row) {
    const int64_t rows = a.outer * a.inner, chunks = rows < kGrain ? 1 : rows / kGrain;
    if (a.dtype == c10::ScalarType::Double)
      return divide<double>(a, rows, chunks, divisor_out, bad_row);
    return divide<float>(a, rows, chunks, divisor_out, bad_row);
  }
  template <class real>
  static Error divide(const CrossEntropyArgs& a, int64_t rows, int64_t chunks, void* divisor_out,
                      int64_t* bad_row) {
    TargetSum one, *const only = chunks == 1 ? &one : nullptr;
    auto* const loss = static_cast<real*>(a.loss);
    cpu::parallel(chunks, 1, [=, &a](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t first = k * kGrain;
        const TargetSum sum = sum_targets<real>(a, first, k + 1 < chunks ? first + kGrain : rows);
        memcpy(only ? static_cast<void*>(only) : loss + first, &sum, sizeof sum);
      }
    });
    TargetSum all;
    for (int64_t k = 0; k < chunks; ++k) {
      TargetSum part = one;
      if (!only) memcpy(&part, loss + k * kGrain, sizeof part);
      if (all.bad_row < 0) all.bad_row = part.bad_row;
      all.add<real>(part.sum);
      all.add<real>(-part.lost);
    }
    *bad_row = all.bad_row;
    *static_cast<real*>(divisor_out) = static_cast<real>(all.sum);
    return nullptr;
  }
  static constexpr CrossEntropyKernel row{Op::name, &forward, &forward_probability, &divisor};
};

using SoftmaxTable = Table<SoftmaxKernel, MakeSoftmax, Softmaxes>;
using CrossEntropyTable = Table<CrossEntropyKernel, MakeCrossEntropy, CrossEntropies>;

}  // namespace

extern constinit const KernelTable<SoftmaxKernel> softmax_kernels{SoftmaxTable::rows,
                                                                  std::size(SoftmaxTable::rows)};
extern constinit const KernelTable<CrossEntropyKernel> cross_entropy_kernels{
    CrossEntropyTable::rows, std::size(CrossEntropyTable::rows)};

}  // namespace fastops::CPU_CAPABILITY
