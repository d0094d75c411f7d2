// Cross-entropy over the middle dimension of (outer, n, inner), against classes, pairs of classes
// or distributions: the loss and, in the same visit, its gradient.
#include "../formulas/cross_entropy.h"
#include "../kernels/cross_entropy.h"
#include "columns.cuh"
#include "elementwise.cuh"
#include "row_tile.cuh"

namespace fastops::cuda {
namespace {

constexpr int kDivisorBlock = 512;      // threads of a block that adds up weights of targets
constexpr int64_t kDivisorRows = 8192;  // targets that it adds up

// ------------------------------------------------------------------------------------------------
// targets

// Ends the launch with torch's "device-side assert triggered". Out of line, and known not to
// return: the registers of the kernel are not kept for it.
[[noreturn]] __device__ __noinline__ void out_of_range(long long t, long long r, long long classes,
                                                       long long ignored) {
#if defined(FASTOPS_EMULATION)
  emulation::fail(
      "cross_entropy: target %lld at row %lld is out of range for %lld classes (ignore_index=%lld)",
      t, r, classes, ignored);
#else
  printf(
      "cross_entropy: target %lld at row %lld is out of range for %lld classes "
      "(ignore_index=%lld)\n",
      t, r, classes, ignored);
  __assert_fail("target in range", __FILE__, __LINE__, "cross_entropy");
#endif
}

template <class scalar_t>
struct Targets {
  using real = real_of<scalar_t>;
  const int64_t* index[2];  // the second of a pair, or null
  const real* weight;
  int64_t ignore_index, classes;
  real smoothing, soft;  // soft = smoothing / classes
  real scale;            // of the gradient
  const real* divisor[2];
  real lam[2];  // the targets' parts, where they are a pair: then the divisors are theirs, and
                // divide the loss as well
  real* loss;
  real* lse;
  real z;
  const scalar_t* probability;

  __device__ __forceinline__ real weight_of(int64_t j) const {
    return weight ? load(weight + j) : real(1);
  }
  __device__ __forceinline__ real hard(int64_t t) const {
    return (real(1) - smoothing) * weight_of(t);
  }
  __device__ __forceinline__ real divided(real whole, int m) const {
    return divisor[m] ? whole / load(divisor[m]) : whole;
  }
  __device__ __forceinline__ bool pair() const { return index[1] != nullptr; }
  __device__ __forceinline__ real gradient_scale() const {
    return pair() ? scale : divided(scale, 0);
  }
  // What the distribution with q at class j has there.
  __device__ __forceinline__ real mix(real q, int64_t j) const {
    return (q * (real(1) - smoothing) + soft) * weight_of(j);
  }
  // What is left of a row that is ignored.
  __device__ __forceinline__ void ignore(int64_t r, real nothing) const {
    store(loss + r, nothing);
    if (lse) store(lse + r, real(0));
  }
  __device__ __forceinline__ void finish(int64_t r, const CrossEntropyRow<real>& row) const {
    store(loss + r, row.loss);
    if (lse) store(lse + r, row.lse);
  }
  // Target m of row r, which is ignore_index or a class.
  __device__ __forceinline__ int64_t at(int64_t r, int m = 0) const {
    const int64_t t = load(index[m] + r);
    if (t != ignore_index && (t < 0 || t >= classes)) out_of_range(t, r, classes, ignore_index);
    return t;
  }
};

// The classes of row r, one or two. One that is ignored, or that there is not, is -1.
template <class scalar_t>
struct Classes {
  using real = real_of<scalar_t>;
  int64_t t[2] = {-1, -1};
  real hard[2] = {}, x[2] = {};
  real share = 0,
       nothing = 0;  // share: the sum of those of the classes not ignored; nothing: 0, or NaN
  bool live = false;

  // Reads no target where there is no such row.
  __device__ __forceinline__ Classes(const Targets<scalar_t>& q, int64_t r, bool exists = true) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m == 1 && !q.pair()) break;
      const int64_t at = exists ? q.at(r, m) : q.ignore_index;
      const real part = q.pair() ? q.divided(q.lam[m], m) : real(1);
      if (at == q.ignore_index) {
        if (q.pair()) nothing += real(0) * part;  // the mean of none is NaN
      } else {
        t[m] = at;
        live = true;
        share += part;
        hard[m] = part * q.hard(at);
      }
    }
  }
  // What the row, whose elements are `stride` apart, has at the classes.
  __device__ __forceinline__ void read(const scalar_t* row, int64_t stride) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
      if (t[m] >= 0) x[m] = static_cast<real>(load(row + t[m] * stride));
  }
  // The end of the row. `soft` is the factor of what label smoothing compares with.
  __device__ __forceinline__ CrossEntropyRow<real> finish(LogSumExp<real> total, real soft,
                                                          const Expectation<real>& smooth,
                                                          real z) const {
    CrossEntropyRow<real> row(total);
    row.loss = nothing;
#pragma unroll
    for (int m = 0; m < 2; ++m)
      if (t[m] >= 0) row.add(hard[m], total.peak - x[m], real(1));
    if (soft != real(0)) row.add(soft, smooth.depth, smooth.mass);
    row.add_z_loss(z);
    return row;
  }
  // Takes from the gradients of the classes i, i + 1, ... what is less at the targets: one
  // comparison for all of them.
  template <class index_t, int n>
  __device__ __forceinline__ void subtract(real (&dx)[n], index_t i, real scale) const {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      using place_t = std::make_unsigned_t<index_t>;
      const auto at = static_cast<place_t>(static_cast<index_t>(t[m]) - i);
      if (at >= n) continue;
#pragma unroll
      for (int k = 0; k < n; ++k)
        if (at == static_cast<place_t>(k)) dx[k] -= hard[m] * scale;
    }
  }
};

template <class real, class Everyone>
__device__ __forceinline__ void join(Expectation<real>& of, const Everyone& everyone, real base) {
  of.move(base);
  of.mass = everyone.sum(of.mass);
  of.depth = everyone.sum(of.depth);
}

// ------------------------------------------------------------------------------------------------
// kernels: classes

// grad may be x.
template <class Op, class scalar_t, int threads, bool held>
__global__ void __launch_bounds__(kBlock<threads>, kRowBlocks<scalar_t, threads, held, 1>)
    cross_entropy_kernel(int64_t rows, int64_t n, const scalar_t* x, scalar_t* grad, bool wide,
                         Targets<scalar_t> targets) {
  using real = real_of<scalar_t>;
  using Tile = RowTile<scalar_t, threads, held, 1>;
  constexpr bool keep = held && Tile::exact;
  const Team<threads> team;
  const bool smoothing = targets.soft != real(0);
  each_row<threads>(rows, [&](int64_t r) {
    Classes<scalar_t> of(targets, r);
    if (!of.live) {  // the whole team agrees
      if (team.rank == 0) targets.ignore(r, of.nothing);
      if (grad) zero_row<threads>(grad + r * n, n, team.rank);
      return;
    }
    const real lowest = c<real>(-std::numeric_limits<double>::infinity());
    Tile tile(n, x + r * n, nullptr, true, lowest, team.rank);
    of.read(x + r * n, 1);
    Expectation<real> smooth;
    const LogSumExp<real> total =
        online_softmax<keep>(tile, team, [&](auto i, auto& v, bool has, real base) {
          if (!smoothing || !has) return;
          smooth.move(base);
#pragma unroll
          for (int k = 0; k < static_cast<int>(std::size(v[0])); ++k)
            smooth.add(targets.weight_of(i + k), v[0][k]);
        });
    const real base = LogSumExp<real>::origin(total.peak);
    if (smoothing) join(smooth, team, base);
    const real soft_part = of.share * targets.soft;
    const CrossEntropyRow<real> row = of.finish(total, soft_part, smooth, targets.z);
    if (team.rank == 0) targets.finish(r, row);
    if (!grad) return;

    // x[t] has been read by all before grad, which may be x, is written: blocks have met meanwhile.
    if constexpr (threads == kWarp) team.sync();
    const real scale = targets.gradient_scale();
    const real all = row.total * scale, soft = soft_part * scale;
    tile.each([&](auto i, auto& v, bool has) {
#pragma unroll
      for (auto& u : v[0]) {
        const real e = keep ? u : exp_below(u - base);
        u = Op::gradient(e * row.inverse, all, real(0));
      }
      if (smoothing && has) {
#pragma unroll
        for (int k = 0; k < static_cast<int>(std::size(v[0])); ++k)
          v[0][k] -= soft * targets.weight_of(i + k);
      }
      of.subtract(v[0], i, scale);
      tile.put(grad + r * n, wide, i, v[0], has);
    });
  });
}

template <class Op, class scalar_t>
__global__ void __launch_bounds__(kColumnBlock, kResident)
    cross_entropy_columns_kernel(Tiles tiles, const scalar_t* x, scalar_t* grad,
                                 Targets<scalar_t> targets) {
  using real = real_of<scalar_t>;
  const bool smoothing = targets.soft != real(0);
  tiles.each([&](int64_t r, int64_t offset, bool exists) {
    Classes<scalar_t> of(targets, r, exists);
    of.read(x + offset, tiles.inner);
    const bool live = of.live;
    Expectation<real> smooth;
    const LogSumExp<real> total =
        online_softmax_of_column(tiles, x + offset, live, [&](int64_t j, real u, real base) {
          if (!smoothing) return;
          smooth.move(base);
          smooth.add(targets.weight_of(j), u);
        });
    const real base = LogSumExp<real>::origin(total.peak);
    if (smoothing) join(smooth, tiles, base);
    const real soft_part = of.share * targets.soft;
    const CrossEntropyRow<real> row = of.finish(total, soft_part, smooth, targets.z);
    if (exists && tiles.first() == 0) {
      if (live) {
        targets.finish(r, row);
      } else {
        targets.ignore(r, of.nothing);
      }
    }
    if (!grad) return;
    const real scale = targets.gradient_scale();
    const real all = row.total * scale, soft = soft_part * scale;
    for (int64_t j = tiles.first(); exists && j < tiles.n; j += tiles.slices()) {
      const int64_t at = offset + j * tiles.inner;
      real dx[1] = {};
      if (live) {
        const real e = exp_below(static_cast<real>(load(x + at)) - base);
        dx[0] = Op::gradient(e * row.inverse, all, smoothing ? soft * targets.weight_of(j) : soft);
        of.subtract(dx, j, scale);
      }
      store(grad + at, static_cast<scalar_t>(dx[0]));
    }
  });
}

// ------------------------------------------------------------------------------------------------
// kernels: distributions

template <class real>
__device__ __forceinline__ CrossEntropyRow<real> of_distribution(LogSumExp<real> total,
                                                                 const Expectation<real>& of,
                                                                 real z) {
  CrossEntropyRow<real> row(total);
  row.add(real(1), of.depth, of.mass);
  row.add_z_loss(z);
  return row;
}

// grad may be x.
template <class Op, class scalar_t, int threads, bool held>
__global__ void __launch_bounds__(kBlock<threads>, kRowBlocks<scalar_t, threads, held, 2>)
    probability_kernel(int64_t rows, int64_t n, const scalar_t* x, scalar_t* grad, bool wide_q,
                       bool wide_grad, Targets<scalar_t> targets) {
  using real = real_of<scalar_t>;
  using Tile = RowTile<scalar_t, threads, held, 2>;
  constexpr bool keep = held && Tile::exact;
  const Team<threads> team;
  each_row<threads>(rows, [&](int64_t r) {
    const real lowest = c<real>(-std::numeric_limits<double>::infinity());
    Tile tile(n, x + r * n, targets.probability + r * n, wide_q, lowest, team.rank);
    Expectation<real> of;
    const LogSumExp<real> total =
        online_softmax<keep>(tile, team, [&](auto i, auto& v, bool has, real base) {
          if (!has) return;
          of.move(base);
#pragma unroll
          for (int k = 0; k < static_cast<int>(std::size(v[0])); ++k)
            of.add(targets.mix(v[1][k], i + k), v[0][k]);
        });
    const real base = LogSumExp<real>::origin(total.peak);
    join(of, team, base);
    const CrossEntropyRow<real> row = of_distribution(total, of, targets.z);
    if (team.rank == 0) targets.finish(r, row);
    if (!grad) return;

    const real scale = targets.gradient_scale(), all = row.total * scale;
    tile.each([&](auto i, auto& v, bool has) {
      if (!has) return;
#pragma unroll
      for (int k = 0; k < static_cast<int>(std::size(v[0])); ++k) {
        const real e = keep ? v[0][k] : exp_below(v[0][k] - base);
        v[0][k] = Op::gradient(e * row.inverse, all, targets.mix(v[1][k], i + k) * scale);
      }
      tile.put(grad + r * n, wide_grad, i, v[0], has);
    });
  });
}

template <class Op, class scalar_t>
__global__ void __launch_bounds__(kColumnBlock, kResident)
    probability_columns_kernel(Tiles tiles, const scalar_t* x, scalar_t* grad,
                               Targets<scalar_t> targets) {
  using real = real_of<scalar_t>;
  tiles.each([&](int64_t r, int64_t offset, bool live) {
    const auto mixed = [&](int64_t j) {
      return targets.mix(static_cast<real>(load(targets.probability + offset + j * tiles.inner)),
                         j);
    };
    Expectation<real> of;
    const LogSumExp<real> total =
        online_softmax_of_column(tiles, x + offset, live, [&](int64_t j, real u, real base) {
          of.move(base);
          of.add(mixed(j), u);
        });
    const real base = LogSumExp<real>::origin(total.peak);
    join(of, tiles, base);
    const CrossEntropyRow<real> row = of_distribution(total, of, targets.z);
    if (live && tiles.first() == 0) targets.finish(r, row);
    if (!grad) return;
    const real scale = targets.gradient_scale(), all = row.total * scale;
    for (int64_t j = tiles.first(); live && j < tiles.n; j += tiles.slices()) {
      const int64_t at = offset + j * tiles.inner;
      const real e = exp_below(static_cast<real>(load(x + at)) - base);
      store(grad + at, static_cast<scalar_t>(Op::gradient(e * row.inverse, all, mixed(j) * scale)));
    }
  });
}

// ------------------------------------------------------------------------------------------------
// kernels: sum of the targets' weights

// A block per kDivisorRows rows, whose sums join_divisor_kernel adds, one after the other: the
// order of summation is the same in every run.
template <class scalar_t>
__global__ void __launch_bounds__(kDivisorBlock, kResident)
    divisor_kernel(int64_t rows, int64_t each, Targets<scalar_t> targets, real_of<scalar_t>* out) {
  double sum = 0;
  const int64_t begin = blockIdx.x * each, end = begin + each < rows ? begin + each : rows;
  for (int64_t r = begin + threadIdx.x; r < end; r += kDivisorBlock) {
    const int64_t t = targets.at(r);
    if (t != targets.ignore_index) sum += static_cast<double>(targets.weight_of(t));
  }
  sum = Team<kDivisorBlock>().sum(sum);
  if (threadIdx.x == 0) store(out + blockIdx.x, static_cast<real_of<scalar_t>>(sum));
}

template <class real>
__global__ void __launch_bounds__(kDivisorBlock, kResident)
    join_divisor_kernel(int64_t count, const real* part, real* out) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < count; k += kDivisorBlock)
    sum += static_cast<double>(load(part + k));
  sum = Team<kDivisorBlock>().sum(sum);
  if (threadIdx.x == 0) store(out, static_cast<real>(sum));
}

// ------------------------------------------------------------------------------------------------
// a saved gradient

struct Rescale {
  static constexpr int inputs = 1, outputs = 1;
  template <class real>
  struct Scaled {
    real factor;
    __device__ __forceinline__ bool idle() const { return factor == real(1); }
    template <int n>
    __device__ __forceinline__ void operator()(int64_t, const real (&x)[1][n],
                                               real (&y)[1][n]) const {
#pragma unroll
      for (int k = 0; k < n; ++k) y[0][k] = x[0][k] * factor;
    }
  };
  template <class real>
  struct Functor {
    const void* factor;
    c10::ScalarType dtype;
    __device__ __forceinline__ Scaled<real> prepared() const {
      if (dtype == c10::ScalarType::Half)
        return {static_cast<real>(load(static_cast<const c10::Half*>(factor)))};
      if (dtype == c10::ScalarType::BFloat16)
        return {static_cast<real>(load(static_cast<const c10::BFloat16*>(factor)))};
      return {load(static_cast<const real*>(factor))};
    }
  };
};

Error rescale(const RescaleArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    auto* grad = static_cast<scalar_t*>(a.grad);
    std::array<Operand<scalar_t>, 1> in;
    in[0].p = grad;
    return launch_elementwise<Rescale, scalar_t>(
        a.n, {grad}, in, {a.factor, a.factor_is_real ? c10::ScalarType::Float : a.dtype}, a.stream);
  });
}

// ------------------------------------------------------------------------------------------------
// launchers

template <class scalar_t>
Targets<scalar_t> targets_of(const CrossEntropyArgs& a) {
  using real = real_of<scalar_t>;
  Targets<scalar_t> t;
  t.index[0] = a.target;
  t.index[1] = a.second_target;
  t.weight = static_cast<const real*>(a.weight);
  t.ignore_index = a.ignore_index;
  t.classes = a.n;
  t.smoothing = static_cast<real>(a.label_smoothing);
  t.soft = static_cast<real>(a.n > 0 ? a.label_smoothing / static_cast<double>(a.n) : 0.0);
  t.scale = static_cast<real>(a.scale);
  t.divisor[0] = static_cast<const real*>(a.divisor);
  t.divisor[1] = static_cast<const real*>(a.second_divisor);
  t.lam[0] = static_cast<real>(a.lam);
  t.lam[1] = static_cast<real>(1 - a.lam);
  t.loss = static_cast<real*>(a.loss);
  t.lse = static_cast<real*>(a.lse);
  t.z = static_cast<real>(a.z_loss);
  t.probability = static_cast<const scalar_t*>(a.probability);
  return t;
}

template <class Op>
Error cross_entropy(const CrossEntropyArgs& a) {
  if (a.outer * a.inner == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    auto* x = static_cast<const scalar_t*>(a.x);
    auto* grad = static_cast<scalar_t*>(a.grad);
    const Targets<scalar_t> targets = targets_of<scalar_t>(a);
    if (a.inner > 1)
      return launch_columns(cross_entropy_columns_kernel<Op, scalar_t>, a.stream, a.outer, a.n,
                            a.inner, x, grad, targets);
    return by_length<scalar_t, 1>(a.n, [&](auto threads, auto held) {
      return launch_rows<threads>(cross_entropy_kernel<Op, scalar_t, threads, held>, a.stream,
                                  a.outer, a.n, x, grad, same_alignment<scalar_t>(x, grad),
                                  targets);
    });
  });
}

template <class Op>
Error cross_entropy_probability(const CrossEntropyArgs& a) {
  if (a.outer * a.inner == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    auto* x = static_cast<const scalar_t*>(a.x);
    auto* grad = static_cast<scalar_t*>(a.grad);
    const Targets<scalar_t> targets = targets_of<scalar_t>(a);
    if (a.inner > 1)
      return launch_columns(probability_columns_kernel<Op, scalar_t>, a.stream, a.outer, a.n,
                            a.inner, x, grad, targets);
    return by_length<scalar_t, 2>(a.n, [&](auto threads, auto held) {
      return launch_rows<threads>(probability_kernel<Op, scalar_t, threads, held>, a.stream,
                                  a.outer, a.n, x, grad, same_alignment(x, targets.probability),
                                  same_alignment<scalar_t>(x, grad), targets);
    });
  });
}

Error divisor(const CrossEntropyArgs& a, void* divisor_out, int64_t* bad_row) {
  *bad_row = -1;  // a target out of range stops the kernel
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using real = real_of<scalar_t>;
    const int64_t rows = a.outer * a.inner,
                  each = a.loss ? kDivisorRows : std::max<int64_t>(rows, 1);
    const int64_t blocks = std::max<int64_t>((rows + each - 1) / each, 1);
    auto* out = static_cast<real*>(divisor_out);
    auto* part = blocks == 1 ? out : static_cast<real*>(a.loss);  // which holds nothing yet
    const Error error = launch(divisor_kernel<scalar_t>, blocks, kDivisorBlock, a.stream, rows,
                               each, targets_of<scalar_t>(a), part);
    if (error || blocks == 1) return error;
    return launch(join_divisor_kernel<real>, 1, kDivisorBlock, a.stream, blocks, part, out);
  });
}

// ------------------------------------------------------------------------------------------------
// table

template <class Op>
struct MakeCrossEntropy {
  static constexpr CrossEntropyKernel kernel{Op::name, &cross_entropy<Op>,
                                             &cross_entropy_probability<Op>, &divisor, &rescale};
};
using CrossEntropyTable = Table<CrossEntropyKernel, MakeCrossEntropy, CrossEntropies>;

}  // namespace

extern constinit const KernelTable<CrossEntropyKernel> cross_entropy_kernels{
    CrossEntropyTable::kernels, std::size(CrossEntropyTable::kernels)};

}  // namespace fastops::cuda
