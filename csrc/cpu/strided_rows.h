// Rows whose elements are not contiguous: a vector holds one element of each of several neighboring
// rows. No formula by name.
#pragma once
#include "online_softmax.h"
#include "parallel.h"

namespace fastops::CPU_CAPABILITY {
namespace {

// Up to a vector's lanes of neighboring rows: their elements j are contiguous, at j inner. Short
// rows are copied to `scratch`: in place their elements may be a power of two apart, and evict each
// other from the caches.
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
  // The maximum of each row. A NaN may be lost here; it shows in the sums.
  FASTOPS_FN void peaks(int64_t n, V (&peak)[L::count]) const {
    for (auto& p : peak) p = V(-std::numeric_limits<typename L::real>::infinity());
    for (int64_t j = 0; j < n; ++j) {
      V u[L::count];
      load_first(j, u);
      for (int k = 0; k < L::count; ++k) peak[k] = larger(u[k], peak[k]);
    }
  }
  // The sums of exp(x - base). If `left`, the exponentials replace x in the scratch memory.
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
  // exp(x - base), from the scratch memory if exponentials() has left it there.
  FASTOPS_FN void exponential(int64_t j, const V (&base)[L::count], V (&v)[L::count]) const {
    load(j, v);
    if (scratch) return;
    for (int k = 0; k < L::count; ++k) v[k] = exp(v[k] - base[k]);
  }
};

// Neighboring StridedRows. If their elements are far apart there are many, which are read and
// written a contiguous run at a time; else one vector of them.
template <class L, class scalar_t>
struct RowTile {
  using V = typename L::V;
  using real = typename L::real;
  static constexpr int64_t kNear =
      (64 << 10) / static_cast<int64_t>(sizeof(real));  // reals that are kept on the stack
  static constexpr int64_t kTiled =
      (128 << 10) / static_cast<int64_t>(sizeof(real));  // and in a tile
  static constexpr int64_t kAhead =
      2;  // runs to prefetch: the hardware's prefetching stops at the end of a page
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

// In parallel: rows(begin, end) for ranges of contiguous rows, or columns(o, i, count, memory) for
// the neighboring rows of a RowTile, with memory for `tiles` tiles (null if it holds one vector).
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

}  // namespace
}  // namespace fastops::CPU_CAPABILITY
