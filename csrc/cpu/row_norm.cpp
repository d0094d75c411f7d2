// Layer norm and RMS norm of rows. A row is read from memory once and is in the cache after that:
// its sums are taken, with the mean subtracted where much would cancel, and then its results.
#include <cstdlib>

#include "../formulas/norms.h"
#include "../kernels/row_norm.h"
#include "online_softmax.h"
#include "parallel.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kNear = 4096;  // reals of a row that have room on the stack

// The sums of m terms over n elements: block by block in real, the blocks in double. terms(i,
// count, t) makes the terms of `count` elements from i on.
template <class L, int m, class Terms>
FASTOPS_FN void sum_row(int64_t n, double (&total)[m], Terms terms) {
  using V = typename L::V;
  constexpr int chains = 4 / L::count;
  const V zero(typename L::real(0));
  for (auto& t : total) t = 0;
  for (int64_t begin = 0; begin < n; begin += kMinBlock) {
    const int64_t end = begin + kMinBlock < n ? begin + kMinBlock : n;
    V sum[m][4];
    for (auto& s : sum)
      for (auto& v : s) v = zero;
    int64_t i = begin;
    for (; i + chains * L::size <= end; i += chains * L::size)
      for (int c = 0; c < chains; ++c) {
        V t[m][L::count];
        terms(i + c * L::size, std::integral_constant<int64_t, L::size>{}, t);
        for (int q = 0; q < m; ++q)
          for (int k = 0; k < L::count; ++k)
            sum[q][c * L::count + k] = sum[q][c * L::count + k] + t[q][k];
      }
    for_each_vector<L::size>(i, end, [&](int64_t at, auto count) {
      V t[m][L::count];
      terms(at, count, t);
      for (int q = 0; q < m; ++q) {
        if (count < L::size) L::mask_tail(count, 0, t[q]);
        for (int k = 0; k < L::count; ++k) sum[q][k] = sum[q][k] + t[q][k];
      }
    });
    for (int q = 0; q < m; ++q)
      total[q] += sum_of_lanes((sum[q][0] + sum[q][1]) + (sum[q][2] + sum[q][3]));
  }
}

// What a row of float16 or bfloat16 keeps of v.
template <class L, class scalar_t>
FASTOPS_FN void round_to(typename L::V (&v)[L::count]) {
  if constexpr (L::reduced) {
    alignas(64) scalar_t raw[L::size];
    L::store(raw, L::size, v);
    L::load(raw, L::size, v);
  }
}

// Asks for the memory of the next row, of which the processor knows nothing.
template <class scalar_t>
FASTOPS_FN void prefetch(const scalar_t* p) {
  __builtin_prefetch(p, 0, 2);
}

template <class real>
struct Statistics {
  real mean, rest;  // the mean is the sum of both
  real inverse;     // 1 / sqrt(variance + eps)
};

// `sum` and `squares` are those of the row's elements.
template <class real>
FASTOPS_FN Statistics<real> statistics(const real* row, int64_t n, bool centered, double eps,
                                       double sum, double squares) {
  using R = VecIO<real>;
  using V = typename R::V;
  const double count = static_cast<double>(n);
  Statistics<real> s{0, 0, 0};
  double variance = squares / count;
  if (centered) {
    Moments<double> of{0, 0};
    of.merge_sums(0, sum, squares, 1 / count, 1, 0);
    s.mean = static_cast<real>(of.mean);
    s.rest = static_cast<real>(of.mean - static_cast<double>(s.mean));
    // The squares hold the mean's: where that is the larger part, or too large a one, they are
    // taken anew without it.
    if (!(of.mean * of.mean * count <= of.m2 && of.m2 <= std::numeric_limits<double>::max())) {
      const V mean(s.mean);
      double d[2];
      sum_row<R>(n, d, [&](int64_t i, auto m, V(&t)[2][R::count]) {
        R::load(row + i, m, t[0]);
        t[0][0] = t[0][0] - mean;
        t[1][0] = t[0][0] * t[0][0];
      });
      of = {0, 0};
      of.merge_sums(0, d[0], d[1], 1 / count, 1, 0);
      s.rest = static_cast<real>(of.mean);
      if (of.m2 < 0) of.m2 = 0;
    }
    variance = of.m2 / count;
  }
  s.inverse = static_cast<real>(1 / fastops::sqrt(variance + eps));
  return s;
}

// The weight or the bias of n elements; `otherwise` where there is none.
template <class L, class N>
FASTOPS_FN void load_or(const typename L::real* p, int64_t i, N n, double otherwise,
                        typename L::V (&v)[L::count]) {
  if (p) {
    load_real<L>(p + i, n, v);
  } else {
    for (auto& u : v) u = typename L::V(static_cast<typename L::real>(otherwise));
  }
}

// `added`: whether there is a residual. Asked within the loops, it costs short rows a fifth.
template <bool added>
Error forward_of(const RowNormArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = VecIO<scalar_t>;
    using V = typename L::V;
    using real = typename L::real;
    // Whether the row is kept in real: where it is not there as x, as what is streamed has left the
    // caches.
    constexpr bool kept = L::reduced || added;
    auto* x = static_cast<const scalar_t*>(a.x);
    auto* residual = static_cast<const scalar_t*>(a.residual);
    auto *y = static_cast<scalar_t*>(a.y), *sum = static_cast<scalar_t*>(a.sum);
    auto *weight = static_cast<const real*>(a.weight), *bias = static_cast<const real*>(a.bias);
    auto *mean = static_cast<real*>(a.mean), *inverse = static_cast<real*>(a.inverse);
    const int64_t n = a.n;
    const bool streamed = streams_rows<L>(y, a.rows, n, x),
               sum_streamed = n % L::size == 0 && streams_rows<L>(sum, a.rows, n, x);
    const bool centered = a.centered;
    const double eps = a.eps;
    cpu::parallel(a.rows, rows_per_thread(n), [=](int64_t begin, int64_t end) {
      alignas(64) real room[kept ? kNear : 1];
      real* near = room;
      if (kept && n > kNear) near = static_cast<real*>(std::malloc(n * sizeof(real)));
      for (int64_t r = begin; r < end; ++r) {
        const int64_t from = r * n, ahead = r + 1 < end ? n : 0;
        double total[2];
        sum_row<L>(n, total, [&](int64_t i, auto count, V(&t)[2][L::count]) {
          L::load(x + from + i, count, t[0]);
          if constexpr (added) {
            V u[L::count];
            L::load(residual + from + i, count, u);
            for (int k = 0; k < L::count; ++k) t[0][k] = t[0][k] + u[k];
            round_to<L, scalar_t>(t[0]);
            L::store(sum + from + i, count, t[0], sum_streamed);
          }
          if constexpr (kept) store_real<L>(near + i, count, t[0]);
          for (int k = 0; k < L::count; ++k) t[1][k] = t[0][k] * t[0][k];
        });
        const real* row = near;
        if constexpr (!kept) row = x + from;
        const Statistics<real> s = statistics(row, n, centered, eps, total[0], total[1]);
        if (centered) mean[r] = s.mean + s.rest;
        inverse[r] = s.inverse;
        const V m(s.mean), rest(s.rest), scale(s.inverse);
        const Out<L, scalar_t> out(y, r, n, streamed);
        out.for_each_vector(0, n, [&](int64_t i, auto count) {
          V v[L::count], w[L::count], b[L::count];
          prefetch(x + from + i + ahead);
          if constexpr (added) prefetch(residual + from + i + ahead);
          load_real<L>(row + i, count, v);
          load_or<L>(weight, i, count, 1, w);
          load_or<L>(bias, i, count, 0, b);
          for (int k = 0; k < L::count; ++k)
            v[k] = RowNorm::forward(v[k] - m, rest, scale * w[k], b[k]);
          out.store(i, count, v);
        });
      }
      if (streamed || sum_streamed) fence();
      if (near != room) std::free(near);
    });
    return nullptr;
  });
}

Error forward(const RowNormArgs& a) {
  return a.residual ? forward_of<true>(a) : forward_of<false>(a);
}

// ------------------------------------------------------------------------------------------------
// backward

// A row's part in the formula of its gradient.
template <class real>
struct RowGradient {
  real mean, inverse, mean_g, slope;
};

Error backward(const RowNormArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = VecIO<scalar_t>;
    using V = typename L::V;
    using real = typename L::real;
    auto* x = static_cast<const scalar_t*>(a.x);
    auto* dy = static_cast<const scalar_t*>(a.dy);
    auto* dsum = static_cast<const scalar_t*>(a.dsum);
    auto* dx = static_cast<scalar_t*>(a.dx);
    auto* weight = static_cast<const real*>(a.weight);
    auto *mean = static_cast<const real*>(a.mean), *inverse = static_cast<const real*>(a.inverse);
    auto* partial = static_cast<real*>(a.workspace);
    const int64_t rows = a.rows, n = a.n;
    const int64_t chunks = row_norm_chunks(rows, n), each = row_norm_rows_per_chunk(rows, n);
    real* const results[] = {static_cast<real*>(a.dweight), static_cast<real*>(a.dbias)};
    const int64_t quantities = (results[0] != nullptr) + (results[1] != nullptr);
    const bool streamed = n % L::size == 0 && streams_rows<L>(dx, rows, n, dy) && a.dx != a.dsum;

    // What `count` elements of a row begin with: dy, and x normalized.
    const auto load = [=](int64_t i, auto count, const RowGradient<real>& g, V(&d)[L::count],
                          V(&normal)[L::count]) {
      const V m(g.mean), scale(g.inverse), nothing(real(0));
      L::load(x + i, count, normal);
      L::load(dy + i, count, d);
      for (int k = 0; k < L::count; ++k) normal[k] = RowNorm::forward(normal[k], m, scale, nothing);
    };

    cpu::parallel(chunks, kRowsGrain / (each * n) + 1, [=](int64_t begin, int64_t end) {
      alignas(64) real room[2 * kNear];  // dweight's and dbias's sums of a block
      real* const sums = n <= kNear ? room : static_cast<real*>(std::malloc(2 * n * sizeof(real)));
      real* const of_weight = results[0] ? sums : nullptr;
      real* const of_bias = results[1] ? sums + n : nullptr;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * each, last = first + each < rows ? first + each : rows;
        for (int64_t block = first; block < last; block += kRowBlock) {
          const int64_t past = block + kRowBlock < last ? block + kRowBlock : last;
          for (int64_t j = 0; j < 2 * n; ++j) sums[j] = 0;
          // One row after the other: were several walked side by side, the lines that are streamed
          // would be written by halves.
          for (int64_t r = block; r < past; ++r) {
            const int64_t from = r * n, ahead = r + 1 < last ? n : 0;
            RowGradient<real> g{mean ? mean[r] : 0, inverse[r], 0, 0};
            if (dx) {
              double total[2];
              sum_row<L>(n, total, [&](int64_t i, auto count, V(&t)[2][L::count]) {
                V w[L::count];
                load_or<L>(weight, i, count, 1, w);
                load(from + i, count, g, t[0], t[1]);
                for (int v = 0; v < L::count; ++v) {
                  t[0][v] = t[0][v] * w[v];
                  t[1][v] = t[0][v] * t[1][v];
                }
              });
              if (mean) g.mean_g = static_cast<real>(total[0] / static_cast<double>(n));
              g.slope = static_cast<real>(total[1] / static_cast<double>(n));
            }
            const V scale(g.inverse), mean_g(g.mean_g), slope(g.slope);
            for_each_vector<L::size>(0, n, [&](int64_t i, auto count) {
              V w[L::count], d[L::count], normal[L::count];
              prefetch(x + from + i + ahead);
              prefetch(dy + from + i + ahead);
              load(from + i, count, g, d, normal);
              if (of_weight) {
                for (int v = 0; v < L::count; ++v) w[v] = d[v] * normal[v];
                add_real<L>(of_weight + i, count, w);
              }
              if (of_bias) add_real<L>(of_bias + i, count, d);
              if (!dx) return;
              load_or<L>(weight, i, count, 1, w);
              for (int v = 0; v < L::count; ++v)
                d[v] = RowNorm::backward(d[v] * w[v], normal[v], scale, mean_g, slope);
              if (dsum) {
                L::load(dsum + from + i, count, w);
                for (int v = 0; v < L::count; ++v) d[v] = d[v] + w[v];
              }
              L::store(dx + from + i, count, d, streamed);
            });
          }
          real* to = partial + chunk * quantities * n;
          real* const of_both[] = {of_weight, of_bias};
          for (const real* from : of_both) {
            if (!from) continue;
            for (int64_t j = 0; j < n; ++j) to[j] = block == first ? from[j] : to[j] + from[j];
            to += n;
          }
        }
      }
      if (streamed) fence();
      if (sums != room) std::free(sums);
    });

    int64_t offset = 0;
    for (real* result : results) {
      if (!result) continue;
      constexpr int64_t columns = 64;  // at once
      for (int64_t left = 0; left < n; left += columns) {
        const int64_t width = left + columns < n ? columns : n - left;
        double sum[columns] = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          for (int64_t j = 0; j < width; ++j)
            sum[j] += static_cast<double>(partial[chunk * quantities * n + offset + left + j]);
        for (int64_t j = 0; j < width; ++j) result[left + j] = static_cast<real>(sum[j]);
      }
      offset += n;
    }
    return nullptr;
  });
}

}  // namespace

extern constinit const RowNormKernel row_norm_kernel{&forward, &backward};

}  // namespace fastops::CPU_CAPABILITY
