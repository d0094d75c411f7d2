// Cross-entropy of rows of logits, over the middle dimension of (outer, n, inner), against classes
// or distributions: the loss, and its gradient in the same visit.
#include <cstring>

#include "../formulas/cross_entropy.h"
#include "../kernels/cross_entropy.h"
#include "strided_rows.h"

namespace fastops::CPU_CAPABILITY {
namespace {

// Compensated summation (Kahan, 1965), until the sum is not finite.
template <class T>
FASTOPS_FN void add_compensated(T& sum, T& lost, T v) {
  const T y = v - lost, t = sum + y, error = (t - sum) - y, none = c<T>(0);
  lost = select(error <= none, error, select(error > none, error, none));
  sum = t;
}

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
};

// The targets of `lanes` neighboring rows; an ignored one is -1.
template <class real, int64_t lanes>
struct Classes {
  int64_t t[kMaxTargets][lanes];
  real hard[kMaxTargets][lanes] = {}, x[kMaxTargets][lanes] = {};  // x: the logits of the classes
  real share[lanes] = {}, nothing[lanes] = {},
       live[lanes] = {};  // share: what the classes not ignored are of the loss

  // Of `count` rows from row r on; the logits of class j begin at logits + j stride.
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
      bool all = true;  // the common case, without branches
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
  // What is subtracted from the gradient at lane i's target m. Both targets may be the same class.
  FASTOPS_FN real own(const Target<real>& q, int m, int64_t i) const {
    return q.targets == 2 && t[0][i] == t[1][i] ? hard[0][i] + hard[1][i] : hard[m][i];
  }
};

template <class real>
FASTOPS_FN CrossEntropyRow<real> end_of(const OnlineSoftmax<real>& v) {
  return {v.peak, static_cast<real>(log(v.sum)), static_cast<real>(1 / v.sum)};
}

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
  const real soft_part = of.share[0] * q.soft;
  auto row = end_of(v);
  for (int m = 0; m < q.targets; ++m)
    if (of.t[m][0] >= 0) row.add(of.hard[m][0], v.peak - of.x[m][0], real(1));
  if (q.soft != real(0)) row.add(soft_part, smooth_depth, q.mass);
  row.add_z_loss(q.z);
  *loss = row.loss + of.nothing[0];
  if (q.lse) q.lse[r] = row.lse;
  if (!grad.row) return;

  const V inverse(row.inverse), total(row.total * q.scale), none(real(0));
  const V soft(soft_part * q.scale);
  // The gradient at the targets: their share is subtracted before it is rounded to the dtype.
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
  if (grad.streamed) {  // a store afterwards would read the line back
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
    CrossEntropyRow<V> row(LogSumExp<V>{peak[k], sum[k]});
    for (int m = 0; m < q.targets; ++m)
      row.add(V::loadu(of.hard[m] + k * V::size()), peak[k] - V::loadu(of.x[m] + k * V::size()),
              V(real(1)));
    if (q.soft != real(0))
      row.add(shared(V(q.soft), k), depth[k], V(q.mass), shared(V(q.soft * q.mass), k));
    row.add_z_loss(q.z);
    row.loss.store(out + k * V::size());
    row.lse.store(lse + k * V::size());
    inverse[k] = row.inverse;
    total[k] = row.total * V(q.scale);
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
  // As in cross_entropy_row(): at the targets, before rounding.
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

// The target distributions, smoothed and weighted: w (keep q + soft). Their dtype q_t is that of
// the logits, or float beside narrower ones, which are not copied for it.
template <class L, class q_t>
struct Distribution {
  using real = typename L::real;
  using V = typename L::V;
  const q_t* q;
  const real* weight;
  real keep, soft;

  FASTOPS_FN Distribution(const CrossEntropyArgs& a)
      : q(static_cast<const q_t*>(a.probability)),
        weight(static_cast<const real*>(a.weight)),
        keep(static_cast<real>(1 - a.label_smoothing)),
        soft(static_cast<real>(a.label_smoothing / static_cast<double>(a.n))) {}

  template <class N>
  static FASTOPS_FN void read(const q_t* p, N count, V (&v)[L::count]) {
    if constexpr (std::is_same_v<q_t, real>) {
      load_real<L>(p, count, v);
    } else {
      L::load(p, count, v);
    }
  }
  // Elements from i on of the row at `row`; 0 in a masked tail.
  template <class N>
  FASTOPS_FN void load(const q_t* row, int64_t i, N count, V (&v)[L::count]) const {
    read(row + i, count, v);
    for (int k = 0; k < L::count; ++k) v[k] = v[k] * V(keep) + V(soft);
    if (weight) {
      V w[L::count];
      load_real<L>(weight + i, count, w);
      for (int k = 0; k < L::count; ++k) v[k] = v[k] * w[k];
    }
    if (count < L::size) L::mask_tail(count, 0, v);
  }
};

// Computes a row's Expectation during online_softmax().
template <class L, class q_t>
struct Expect {
  using real = typename L::real;
  using V = typename L::V;
  const Distribution<L, q_t>& distribution;
  const q_t* q;
  Expectation<double> row{};
  Expectation<V> lanes{};  // of the last kFew vectors
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

template <class L, class scalar_t, class q_t, class real>
FASTOPS_FN void cross_entropy_row(const scalar_t* x, const q_t* q, const Out<L, scalar_t>& grad,
                                  const ExpScratch<L>& scratch, real* loss, int64_t n, int64_t r,
                                  const Target<real>& target,
                                  const Distribution<L, q_t>& distribution, real& first,
                                  const scalar_t* next) {
  using V = typename L::V;
  real* const exponential = grad.row ? scratch.beside(grad.row) : nullptr;
  OnlineSoftmax<real> v;
  Expect<L, q_t> expect{distribution, q};
  online_softmax<L>(x, n, first, next, exponential, v, expect);
  auto row = end_of(v);
  row.add(real(1), static_cast<real>(expect.row.depth), static_cast<real>(expect.row.mass));
  row.add_z_loss(target.z);
  *loss = row.loss;
  if (target.lse) target.lse[r] = row.lse;
  if (!grad.row) return;
  const V inverse(row.inverse), total(row.total * target.scale), by(target.scale);
  each_exponential<L>(x, exponential, grad, n, v, [&](int64_t i, auto count, auto& e, V rescale) {
    V w[L::count];
    distribution.load(q, i, count, w);
    for (int k = 0; k < L::count; ++k)
      e[k] = CrossEntropy::gradient(e[k] * (rescale * inverse), total, w[k] * by);
    grad.store(i, count, e);
  });
}

template <class L, class scalar_t, class q_t, class real>
FASTOPS_FN void cross_entropy_columns(const StridedRows<L, scalar_t>& c, const q_t* q,
                                      scalar_t* grad, real* loss, int64_t n, int64_t r,
                                      const Target<real>& target,
                                      const Distribution<L, q_t>& distribution) {
  using V = typename L::V;
  const int64_t count = c.count;
  const V keep(distribution.keep), soft(distribution.soft), by(target.scale);
  const auto load = [&](int64_t j, V(&w)[L::count]) {
    distribution.read(q + j * c.inner, count, w);
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
    CrossEntropyRow<V> row(LogSumExp<V>{peak[k], sum[k]});
    row.add(V(real(1)), of[k].depth, of[k].mass);
    row.add_z_loss(target.z);
    row.loss.store(out + k * V::size());
    row.lse.store(lse + k * V::size());
    inverse[k] = row.inverse;
    total[k] = row.total * by;
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

constexpr int64_t kTargetChunk = 16384;  // rows whose targets are looked at together

// The sum of the weights of some rows' targets, and the first row whose target is out of range.
// Weights in double are summed with compensation; floats summed in double need none.
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
  int64_t live = 0, bad = 0;  // without branches, so that the compiler vectorizes it
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
  enum Targets { kClasses, kDistributions, kRealDistributions };
  static Error forward(const CrossEntropyArgs& a) { return over<kClasses>(a); }
  static Error forward_probability(const CrossEntropyArgs& a) {
    return a.probability_is_real ? over<kRealDistributions>(a) : over<kDistributions>(a);
  }

  template <Targets targets>
  static Error over(const CrossEntropyArgs& a) {
    return dispatch(a.dtype, [&](auto zero) -> Error {
      using scalar_t = decltype(zero);
      using L = VecIO<scalar_t>;
      using real = typename L::real;
      constexpr bool distributions = targets != kClasses;
      using q_t = std::conditional_t<targets == kRealDistributions, real, scalar_t>;
      const Target<real> target(a);
      const Distribution<L, q_t> distribution(a);
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

  // The chunks depend on the number of rows alone, so that the bits do not depend on threads. Each
  // leaves its sum in its own part of `loss`; the last one takes the remainder too.
  static Error divisor(const CrossEntropyArgs& a, void* divisor_out, int64_t* bad_row) {
    const int64_t rows = a.outer * a.inner, chunks = rows < kTargetChunk ? 1 : rows / kTargetChunk;
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
        const int64_t first = k * kTargetChunk;
        const TargetSum sum =
            sum_targets<real>(a, first, k + 1 < chunks ? first + kTargetChunk : rows);
        memcpy(only ? static_cast<void*>(only) : loss + first, &sum, sizeof sum);
      }
    });
    TargetSum all;
    for (int64_t k = 0; k < chunks; ++k) {
      TargetSum part = one;
      if (!only) memcpy(&part, loss + k * kTargetChunk, sizeof part);
      if (all.bad_row < 0) all.bad_row = part.bad_row;
      all.add<real>(part.sum);
      all.add<real>(-part.lost);
    }
    *bad_row = all.bad_row;
    *static_cast<real*>(divisor_out) = static_cast<real>(all.sum);
    return nullptr;
  }
  static constexpr CrossEntropyKernel kernel{Op::name, &forward, &forward_probability, &divisor};
};

using CrossEntropyTable = Table<CrossEntropyKernel, MakeCrossEntropy, CrossEntropies>;

}  // namespace

extern constinit const KernelTable<CrossEntropyKernel> cross_entropy_kernels{
    CrossEntropyTable::kernels, std::size(CrossEntropyTable::kernels)};

}  // namespace fastops::CPU_CAPABILITY
