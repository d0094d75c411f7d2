// Batch norm, with the addition and the activation that follow it: statistics and sums of gradients
// per channel, and the two elementwise passes. Where channels are innermost a vector holds
// neighboring channels, elsewhere neighboring positions; both add up in the same order, so that
// they give the same bits.
#include <cstdlib>

#include "../formulas/norms.h"
#include "../kernels/batch_norm.h"
#include "parallel.h"
#include "vec_io.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread takes at least
constexpr int64_t kRow = 2048;     // elements of a row of channels that is repeated to fill vectors

// Two sums that are taken together.
template <class T>
struct Pair {
  T first, second;
  FASTOPS_FN Pair operator+(const Pair& o) const { return {first + o.first, second + o.second}; }
  // Adds v, and v u to the second. One instruction wherever it is compiled: were the product
  // rounded in one place and not in another, the two layouts would differ.
  FASTOPS_FN void add(T v, T u) {
    first = first + v;
    second = at::vec::fmadd(v, u, second);
  }
};
template <class T>
struct Term {
  T v, u;
};

// leaf(0) + leaf(1) + ... + leaf(lanes - 1), by halves as reduce_lanes() adds the lanes of a
// vector.
template <int lanes, int k = 0, int step = 1, class Leaf>
FASTOPS_FN auto sum_by_halves(Leaf leaf) {
  if constexpr (step == lanes) {
    return leaf(std::integral_constant<int, k>{});
  } else {
    const auto left = sum_by_halves<lanes, k, 2 * step>(leaf);
    return left + sum_by_halves<lanes, k + step, 2 * step>(leaf);
  }
}

struct NoActivation {
  static constexpr const char* params = "";
  template <class T>
  static FASTOPS_FN T forward(T z) {
    return z;
  }
  template <class T>
  static FASTOPS_FN T backward(T, T dy) {
    return dy;
  }
};

// Calls body with the activation's formula: within the loops a choice would be made for every
// vector, and the code of all of them repeated wherever one is unrolled.
template <class Body>
FASTOPS_FN Error with_activation(NormActivation activation, Body body) {
  switch (activation) {
    case NormActivation::kNone:
      return body(NoActivation{});
    case NormActivation::kReLU:
      return body(ReLU{});
    case NormActivation::kReLU6:
      return body(ReLU6{});
    case NormActivation::kLeakyReLU:
      return body(LeakyReLU{});
    case NormActivation::kSiLU:
      return body(SiLU{});
    case NormActivation::kGELU:
      return body(GELU{});
    case NormActivation::kHardswish:
      return body(Hardswish{});
    case NormActivation::kMish:
      return body(Mish{});
  }
  return "unknown activation";
}
// The slope is the parameter of those that have one.
template <class Op, class V>
FASTOPS_FN V activate(V z, V slope) {
  if constexpr (count_params(Op::params) == 0) {
    return Op::forward(z);
  } else {
    return Op::forward(z, slope);
  }
}
template <class Op, class V>
FASTOPS_FN V activate_backward(V z, V dy, V slope) {
  if constexpr (count_params(Op::params) == 0) {
    return Op::backward(z, dy);
  } else {
    return Op::backward(z, dy, slope);
  }
}

// What every pass knows of channel c.
template <class real>
struct Channels {
  const real *mean, *inverse, *weight, *bias;
  const real* sums[2];  // or null
  real count;           // of the elements of a channel

  FASTOPS_FN explicit Channels(const BatchNormArgs& a)
      : mean(static_cast<const real*>(a.mean)),
        inverse(static_cast<const real*>(a.inverse)),
        weight(static_cast<const real*>(a.weight)),
        bias(static_cast<const real*>(a.bias)),
        sums{static_cast<const real*>(a.totals[0]), static_cast<const real*>(a.totals[1])},
        count(static_cast<real>(a.images * a.positions)) {}
  // The operands of the formulas: mean, scale, bias, and of the backward mean_dz and slope.
  static constexpr int operands = 5;
  FASTOPS_FN void get(int64_t c, real (&v)[operands]) const {
    v[0] = mean[c];
    v[1] = weight ? inverse[c] * weight[c] : inverse[c];
    v[2] = bias ? bias[c] : real(0);
    v[3] = sums[0] ? sums[0][c] / count : real(0);
    v[4] = sums[0] ? sums[1][c] / count * inverse[c] * inverse[c] : real(0);
  }
};

// ------------------------------------------------------------------------------------------------
// sums

// The gradient to the activation's input, of `count` elements: what the sums and the backward pass
// begin with.
template <class scalar_t, class Op>
struct Gradient {
  using L = VecIO<scalar_t>;
  using V = typename L::V;
  const scalar_t *x, *dy, *residual;
  bool is_output;
  V slope;

  FASTOPS_FN explicit Gradient(const BatchNormArgs& a)
      : x(static_cast<const scalar_t*>(a.x)),
        dy(static_cast<const scalar_t*>(a.dy)),
        residual(static_cast<const scalar_t*>(a.residual)),
        is_output(a.residual_is_output),
        slope(static_cast<typename L::real>(a.slope)) {}
  // dz and x - mean at element i and on; mean, scale and bias are per vector of real.
  template <class N>
  FASTOPS_FN void load(int64_t i, N n, const V (&mean)[L::count], const V (&scale)[L::count],
                       const V (&bias)[L::count], V (&dz)[L::count],
                       V (&deviation)[L::count]) const {
    V r[L::count];
    L::load(x + i, n, deviation);
    L::load(dy + i, n, dz);
    constexpr bool derivative = !std::is_same_v<Op, NoActivation>;
    if (derivative && residual) L::load(residual + i, n, r);
    for (int k = 0; k < L::count; ++k) {
      const V v = deviation[k];
      deviation[k] = v - mean[k];
      if constexpr (derivative) {
        V z = is_output ? r[k] : BatchNorm::forward(v, mean[k], scale[k], bias[k]);
        if (residual && !is_output) z = z + r[k];
        dz[k] = activate_backward<Op>(z, dz[k], slope);
      }
    }
  }
};

// The blocks of a tensor, and the chunks of them.
struct Blocks {
  int64_t images, channels, positions, per_image, per_chunk, chunks;
  FASTOPS_FN explicit Blocks(const BatchNormArgs& a)
      : images(a.images),
        channels(a.channels),
        positions(a.positions),
        per_image(norm_blocks(a.positions)),
        per_chunk(norm_blocks_per_chunk(a.images, a.channels, a.positions)),
        chunks(norm_chunks(a.images, a.channels, a.positions)) {}
  // Calls body(image, position, count) for the blocks of a chunk.
  template <class Body>
  FASTOPS_FN void each(int64_t chunk, Body body) const {
    const int64_t begin = chunk * per_chunk, all = images * per_image;
    const int64_t end = begin + per_chunk < all ? begin + per_chunk : all;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t image = b / per_image, position = b % per_image * kNormBlock;
      body(image, position, positions - position < kNormBlock ? positions - position : kNormBlock);
    }
  }
  // Of items that are a channel of a chunk each: the chunk and the channel, in an order in which
  // those that follow each other are near in memory that has the channels outermost.
  struct Place {
    int64_t chunk, channel;
  };
  FASTOPS_FN Place place(int64_t item) const {
    if (per_chunk < per_image) return {item % chunks, item / chunks};
    return {item / channels, item % channels};
  }
  // The number of elements of a channel in a chunk.
  FASTOPS_FN int64_t count(int64_t chunk) const {
    int64_t n = 0;
    each(chunk, [&](int64_t, int64_t, int64_t count) { n += count; });
    return n;
  }
};

// The weights by which the next block is merged into what is there.
struct Merge {
  double n = 0, inverse_count = 0, share = 0, weight = 0;
  FASTOPS_FN void next(int64_t count) {
    const double total = n + static_cast<double>(count);
    inverse_count = 1 / static_cast<double>(count);
    share = static_cast<double>(count) / total;
    weight = n * share;
    n = total;
  }
};

// Adds up terms(position) over `count` positions of a block, which are `stride` apart, for a vector
// of channels.
template <class V, int m, class N, class Terms>
FASTOPS_FN void sum_positions(N count, Terms terms, Pair<V> (&sum)[m]) {
  constexpr int lanes = V::size();
  struct Sums {
    Pair<V> v[m];
    FASTOPS_FN Sums operator+(const Sums& o) const {
      Sums s;
      for (int k = 0; k < m; ++k) s.v[k] = v[k] + o.v[k];
      return s;
    }
  };
  const Sums all = sum_by_halves<lanes>([&](auto k) {
    Sums s;
    for (auto& p : s.v) p = {V(0), V(0)};
    for (int64_t at = k; at < count; at += lanes) {
      Term<V> t[m];
      terms(at, t);
      for (int j = 0; j < m; ++j) s.v[j].add(t[j].v, t[j].u);
    }
    return s;
  });
  for (int k = 0; k < m; ++k) sum[k] = all.v[k];
}

// The sum over the lanes of both.
template <class V>
FASTOPS_FN Pair<typename V::value_type> reduce_pair(const Pair<V>& p) {
  const auto add = [](auto a, auto b) { return a + b; };
  return {reduce_lanes(p.first, add), reduce_lanes(p.second, add)};
}

// Asks for the memory behind n elements at p, where as many will be read next: a column at a time,
// which the processor does not foresee.
template <class scalar_t>
FASTOPS_FN void prefetch(const scalar_t* p, int64_t n) {
  constexpr int64_t line = 64 / sizeof(scalar_t);
  for (int64_t i = n; i < 2 * n; i += line) __builtin_prefetch(p + i, 0, 2);
}

// Runs body(count) with the count of a whole block as a constant.
template <class Body>
FASTOPS_FN void with_count(int64_t count, Body body) {
  if (count == kNormBlock) {
    body(std::integral_constant<int64_t, kNormBlock>{});
  } else {
    body(count);
  }
}

Error statistics(const BatchNormArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = VecIO<scalar_t>;
    using V = typename L::V;
    using real = typename L::real;
    constexpr int wide = sizeof(double) / sizeof(real);
    const Blocks blocks(a);
    auto* x = static_cast<const scalar_t*>(a.x);
    auto* partial = static_cast<double*>(a.workspace);  // per chunk: the means, then the m2
    const int64_t channels = a.channels, positions = a.positions;
    if (a.channels_last) {
      cpu::parallel(blocks.chunks, 1, [=](int64_t first, int64_t last) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
          double *mean = partial + chunk * 2 * channels, *m2 = mean + channels;
          for (int64_t c = 0; c < 2 * channels; ++c) mean[c] = 0;
          Merge merge;
          blocks.each(chunk, [&](int64_t image, int64_t position, int64_t count) {
            merge.next(count);
            const scalar_t* from = x + (image * positions + position) * channels;
            prefetch(from, count * channels);
            with_count(count, [&](auto count) {
              for_each_vector<L::size, false>(0, channels, [&](int64_t c, auto n) {
                V origin[L::count];
                L::load(from + c, n, origin);
                Pair<V> sum[L::count];
                sum_positions(
                    count,
                    [&](int64_t at, Term<V>(&t)[L::count]) {
                      V v[L::count];
                      L::load(from + at * channels + c, n, v);
                      for (int k = 0; k < L::count; ++k) {
                        const V d = v[k] - origin[k];
                        t[k] = {d, d};
                      }
                    },
                    sum);
                for (int k = 0; k < L::count; ++k) {
                  Vec<double> o[wide], s[wide], q[wide];
                  promote(origin[k], o);
                  promote(sum[k].first, s);
                  promote(sum[k].second, q);
                  for (int w = 0; w < wide; ++w) {
                    const int64_t at = c + k * V::size() + w * Vec<double>::size();
                    int64_t left = c + n - at;
                    if (left <= 0) break;
                    if (left > Vec<double>::size()) left = Vec<double>::size();
                    Moments<Vec<double>> of{Vec<double>::loadu(mean + at, left),
                                            Vec<double>::loadu(m2 + at, left)};
                    of.merge_sums(o[w], s[w], q[w], Vec<double>(merge.inverse_count),
                                  Vec<double>(merge.share), Vec<double>(merge.weight));
                    of.mean.store(mean + at, static_cast<int>(left));
                    of.m2.store(m2 + at, static_cast<int>(left));
                  }
                }
              });
            });
          });
        }
      });
    } else {
      cpu::parallel(blocks.chunks * channels, 1, [=](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; ++item) {
          const int64_t chunk = blocks.place(item).chunk, c = blocks.place(item).channel;
          Moments<double> of{0, 0};
          Merge merge;
          blocks.each(chunk, [&](int64_t image, int64_t position, int64_t count) {
            merge.next(count);
            const scalar_t* from = x + (image * channels + c) * positions + position;
            const real first_value = L::one(from);
            const V origin(first_value);
            Pair<V> sum{V(0), V(0)};
            for_each_vector<L::size>(0, count, [&](int64_t i, auto n) {
              V v[L::count];
              L::load(from + i, n, v);
              for (auto& u : v) u = u - origin;
              if (n < L::size) L::mask_tail(n, 0, v);
              for (int k = 0; k < L::count; ++k) sum.add(v[k], v[k]);
            });
            const Pair<real> total = reduce_pair(sum);
            of.merge_sums(first_value, total.first, total.second, merge.inverse_count, merge.share,
                          merge.weight);
          });
          partial[chunk * 2 * channels + c] = of.mean;
          partial[(chunk * 2 + 1) * channels + c] = of.m2;
        }
      });
    }
    auto *mean = static_cast<real*>(a.totals[0]), *variance = static_cast<real*>(a.totals[1]);
    cpu::parallel(channels, kGrain / (blocks.chunks * 4) + 1, [=](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        Moments<double> of{0, 0};
        Merge merge;
        for (int64_t chunk = 0; chunk < blocks.chunks; ++chunk) {
          merge.next(blocks.count(chunk));
          of.merge(partial[chunk * 2 * channels + c], partial[(chunk * 2 + 1) * channels + c],
                   merge.share, merge.weight);
        }
        mean[c] = static_cast<real>(of.mean);
        variance[c] = static_cast<real>(of.m2 / merge.n);
      }
    });
    return nullptr;
  });
}

Error sums(const BatchNormArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = VecIO<scalar_t>;
    using V = typename L::V;
    using real = typename L::real;
    constexpr int wide = sizeof(double) / sizeof(real);
    const Blocks blocks(a);
    return with_activation(a.activation, [&]<class Op>(Op) -> Error {
      const Gradient<scalar_t, Op> gradient(a);
      BatchNormArgs constants = a;
      constants.totals[0] = nullptr;
      const Channels<real> per_channel(constants);
      auto* partial = static_cast<double*>(a.workspace);
      const int64_t channels = a.channels, positions = a.positions;
      if (a.channels_last) {
        cpu::parallel(blocks.chunks, 1, [=](int64_t first, int64_t last) {
          for (int64_t chunk = first; chunk < last; ++chunk) {
            double* total = partial + chunk * 2 * channels;
            for (int64_t c = 0; c < 2 * channels; ++c) total[c] = 0;
            blocks.each(chunk, [&](int64_t image, int64_t position, int64_t count) {
              const int64_t from = (image * positions + position) * channels;
              prefetch(gradient.x + from, count * channels);
              prefetch(gradient.dy + from, count * channels);
              if (gradient.residual) prefetch(gradient.residual + from, count * channels);
              for_each_vector<L::size, false>(0, channels, [&](int64_t c, auto n) {
                V mean[L::count], scale[L::count], bias[L::count];
                load_real<L>(per_channel.mean + c, n, mean);
                load_real<L>(per_channel.inverse + c, n, scale);
                if (per_channel.weight) {
                  load_real<L>(per_channel.weight + c, n, bias);
                  for (int k = 0; k < L::count; ++k) scale[k] = scale[k] * bias[k];
                }
                for (auto& b : bias) b = V(real(0));
                if (per_channel.bias) load_real<L>(per_channel.bias + c, n, bias);
                Pair<V> sum[L::count];
                sum_positions(
                    count,
                    [&](int64_t at, Term<V>(&t)[L::count]) {
                      V dz[L::count], deviation[L::count];
                      gradient.load(from + at * channels + c, n, mean, scale, bias, dz, deviation);
                      for (int k = 0; k < L::count; ++k) t[k] = {dz[k], deviation[k]};
                    },
                    sum);
                for (int k = 0; k < L::count; ++k) {
                  Vec<double> s[wide], q[wide];
                  promote(sum[k].first, s);
                  promote(sum[k].second, q);
                  for (int w = 0; w < wide; ++w) {
                    double* to = total + c + k * V::size() + w * Vec<double>::size();
                    int64_t left = total + c + n - to;
                    if (left <= 0) break;
                    if (left > Vec<double>::size()) left = Vec<double>::size();
                    (Vec<double>::loadu(to, left) + s[w]).store(to, static_cast<int>(left));
                    to += channels;
                    (Vec<double>::loadu(to, left) + q[w]).store(to, static_cast<int>(left));
                  }
                }
              });
            });
          }
        });
      } else {
        cpu::parallel(blocks.chunks * channels, 1, [=](int64_t first, int64_t last) {
          for (int64_t item = first; item < last; ++item) {
            const int64_t chunk = blocks.place(item).chunk, c = blocks.place(item).channel;
            real v[Channels<real>::operands];
            per_channel.get(c, v);
            V mean[L::count], scale[L::count], bias[L::count];
            for (int k = 0; k < L::count; ++k)
              mean[k] = V(v[0]), scale[k] = V(v[1]), bias[k] = V(v[2]);
            double total[2] = {0, 0};
            blocks.each(chunk, [&](int64_t image, int64_t position, int64_t count) {
              const int64_t from = (image * channels + c) * positions + position;
              Pair<V> sum{V(0), V(0)};
              for_each_vector<L::size>(0, count, [&](int64_t i, auto n) {
                V dz[L::count], deviation[L::count];
                gradient.load(from + i, n, mean, scale, bias, dz, deviation);
                if (n < L::size) {  // what lies behind the end may be NaN
                  L::mask_tail(n, 0, dz);
                  L::mask_tail(n, 0, deviation);
                }
                for (int k = 0; k < L::count; ++k) sum.add(dz[k], deviation[k]);
              });
              const Pair<real> all = reduce_pair(sum);
              total[0] += all.first;
              total[1] += all.second;
            });
            partial[chunk * 2 * channels + c] = total[0];
            partial[(chunk * 2 + 1) * channels + c] = total[1];
          }
        });
      }
      for (int m = 0; m < 2; ++m) {
        auto* out = static_cast<real*>(a.totals[m]);
        for (int64_t c = 0; c < channels; ++c) {
          double sum = 0;
          for (int64_t chunk = 0; chunk < blocks.chunks; ++chunk)
            sum += partial[(chunk * 2 + m) * channels + c];
          out[c] = static_cast<real>(sum);
        }
      }
      return nullptr;
    });
  });
}

// ------------------------------------------------------------------------------------------------
// elementwise passes

// Calls body(i, n, operand, streamed) for all elements, n of them at i. operand(m, i, n, v) loads
// the m-th operand of their channels.
template <class L, class Body>
FASTOPS_FN void each_element(const BatchNormArgs& a, int used, bool aligned, Body body) {
  using V = typename L::V;
  using real = typename L::real;
  constexpr int operands = Channels<real>::operands;
  const Channels<real> per_channel(a);
  const int64_t channels = a.channels, positions = a.positions;
  if (!a.channels_last) {
    const int64_t runs = a.images * channels;
    cpu::parallel(runs, kGrain / (positions < 1 ? 1 : positions) + 1,
                  [=](int64_t begin, int64_t end) {
                    for (int64_t r = begin; r < end; ++r) {
                      real v[operands];
                      per_channel.get(r % channels, v);
                      const auto operand = [&](int m, int64_t, auto, V(&o)[L::count]) {
                        for (auto& k : o) k = V(v[m]);
                      };
                      for_each_vector<L::size>(0, positions, [&](int64_t i, auto n) {
                        body(r * positions + i, n, operand, aligned && positions % L::size == 0);
                      });
                    }
                    fence();
                  });
    return;
  }
  // Rows of channels that do not fill vectors are joined until they do.
  int64_t together = 1;
  while (channels * together % L::size != 0 && channels * together <= kRow / 2) together *= 2;
  if (channels * together % L::size != 0) together = 1;
  const int64_t row = channels * together, n = a.images * positions * channels;
  alignas(64) real near[operands * kRow];
  real* const values =
      row <= kRow ? near : static_cast<real*>(std::malloc(operands * row * sizeof(real)));
  for (int64_t c = 0; c < channels; ++c) {
    real v[operands];
    per_channel.get(c, v);
    for (int m = 0; m < used; ++m)
      for (int64_t t = 0; t < together; ++t) values[m * row + t * channels + c] = v[m];
  }
  const int64_t rows = (n + row - 1) / row;
  cpu::parallel(rows, kGrain / row + 1, [=](int64_t begin, int64_t end) {
    const auto operand = [&](int m, int64_t j, auto count, V(&o)[L::count]) {
      load_real<L>(values + m * row + j, count, o);
    };
    for (int64_t r = begin; r < end; ++r) {
      const int64_t from = r * row, left = n - from < row ? n - from : row;
      for_each_vector<L::size>(0, left, [&](int64_t j, auto count) {
        const auto of = [&](int m, int64_t, auto, V(&o)[L::count]) { operand(m, j, count, o); };
        body(from + j, count, of, aligned && row % L::size == 0);
      });
    }
    fence();
  });
  if (values != near) std::free(values);
}

Error forward(const BatchNormArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = VecIO<scalar_t>;
    using V = typename L::V;
    auto* x = static_cast<const scalar_t*>(a.x);
    auto* residual = static_cast<const scalar_t*>(a.residual);
    auto* y = static_cast<scalar_t*>(a.y);
    const int64_t n = a.images * a.channels * a.positions;
    const V slope(static_cast<typename L::real>(a.slope));
    const bool stream = streams<L>(y, n, x) && a.y != a.residual;
    return with_activation(a.activation, [&]<class Op>(Op) -> Error {
      each_element<L>(a, 3, stream, [=](int64_t i, auto count, auto& operand, bool streamed) {
        V v[L::count], r[L::count], mean[L::count], scale[L::count], bias[L::count];
        L::load(x + i, count, v);
        if (residual) L::load(residual + i, count, r);
        operand(0, i, count, mean);
        operand(1, i, count, scale);
        operand(2, i, count, bias);
        for (int k = 0; k < L::count; ++k) {
          V z = BatchNorm::forward(v[k], mean[k], scale[k], bias[k]);
          if (residual) z = z + r[k];
          v[k] = activate<Op>(z, slope);
        }
        L::store(y + i, count, v, streamed);
      });
      return nullptr;
    });
  });
}

Error backward(const BatchNormArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using L = VecIO<scalar_t>;
    using V = typename L::V;
    return with_activation(a.activation, [&]<class Op>(Op) -> Error {
      const Gradient<scalar_t, Op> gradient(a);
      auto *dx = static_cast<scalar_t*>(a.dx), *dresidual = static_cast<scalar_t*>(a.dresidual);
      const int64_t n = a.images * a.channels * a.positions;
      const bool stream = streams<L>(dx, n, a.dy) && (!dresidual || streams<L>(dresidual, n, a.dy));
      each_element<L>(a, 5, stream, [=](int64_t i, auto count, auto& operand, bool streamed) {
        V mean[L::count], scale[L::count], o[L::count], dz[L::count], deviation[L::count];
        operand(0, i, count, mean);
        operand(1, i, count, scale);
        operand(2, i, count, o);
        gradient.load(i, count, mean, scale, o, dz, deviation);
        if (dresidual) L::store(dresidual + i, count, dz, streamed);
        V slope[L::count];
        operand(3, i, count, o);
        operand(4, i, count, slope);
        for (int k = 0; k < L::count; ++k)
          dz[k] = BatchNorm::backward(dz[k], deviation[k], scale[k], o[k], slope[k]);
        L::store(dx + i, count, dz, streamed);
      });
      return nullptr;
    });
  });
}

}  // namespace

extern constinit const BatchNormKernel batch_norm_kernel{&statistics, &forward, &sums, &backward};

}  // namespace fastops::CPU_CAPABILITY
