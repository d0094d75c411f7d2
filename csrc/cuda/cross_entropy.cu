// Softmax, log-softmax and cross-entropy over the middle dimension of (outer, n, inner). Where
// inner is 1 a row is contiguous: a warp takes a short one and a block a long one, held in
// registers between its visits while it fits, read again where it does not. Elsewhere neighbouring
// threads take neighbouring rows, so that every access is coalesced.
#include "../formulas/cross_entropy.h"
#include "../kernels/cross_entropy.h"
#include "../kernels/softmax.h"
#include "launch.cuh"
#include "pack.cuh"
#include "team.cuh"

namespace fastops::cuda {
namespace {

constexpr int kWarpBlock = 128;         // threads of a block whose warps take a row each
constexpr int kRowBlock = 512;          // threads of a block that takes a row and holds it
constexpr int kColumnBlock = 256;       // threads of a block that takes up to 32 columns
constexpr int64_t kDivisorRows = 8192;  // targets that a block adds up

// Threads of a block that takes a row and reads it again: exp and log in double want more registers
// than 512 can have.
template <class scalar_t>
constexpr int kLongRowBlock = sizeof(scalar_t) == 8 ? 256 : 512;

// Elements of a row that a thread holds.
template <class scalar_t>
constexpr int kHeld = sizeof(scalar_t) == 8 ? 8 : 32;

// ------------------------------------------------------------------------------------------------
// rows

// A row of n elements cut at the 16-byte boundaries of its memory: pack j holds elements j * size -
// shift and on, the first and last pack may be partly outside. `shift` is that of the buffer it was
// made for; others are read and written in packs too where `wide` says that their boundaries fall
// together with it.
template <class scalar_t, class index_t>
struct Row {
  static constexpr int size = pack_size<scalar_t>;
  index_t n, packs;
  int shift;
  __device__ __forceinline__ Row(const scalar_t* p, int64_t n)
      : n(static_cast<index_t>(n)),
        shift(static_cast<int>(reinterpret_cast<uintptr_t>(p) % kPackBytes / sizeof(scalar_t))) {
    packs = (this->n + shift + size - 1) / size;
  }
  __device__ __forceinline__ index_t first(index_t pack) const { return pack * size - shift; }
  __device__ __forceinline__ bool has(index_t i) const { return i >= 0 && i < n; }
  __device__ __forceinline__ bool whole(index_t i) const { return i >= 0 && i + size <= n; }

  template <class real>
  __device__ __forceinline__ void get(const scalar_t* p, bool wide, index_t i, real (&v)[size],
                                      real filler) const {
    if (wide && whole(i)) {
      load_wide(p + i, v);
    } else {
#pragma unroll
      for (int k = 0; k < size; ++k)
        v[k] = has(i + k) ? static_cast<real>(load(p + i + k)) : filler;
    }
  }
  template <class real>
  __device__ __forceinline__ void put(scalar_t* p, bool wide, index_t i,
                                      const real (&v)[size]) const {
    if (wide && whole(i)) {
      store_wide(p + i, v);
    } else {
#pragma unroll
      for (int k = 0; k < size; ++k)
        if (has(i + k)) store(p + i + k, static_cast<scalar_t>(v[k]));
    }
  }
};

template <class scalar_t>
__host__ __device__ __forceinline__ bool same_alignment(const scalar_t* a, const scalar_t* b) {
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % kPackBytes == 0;
}

// The packs of `inputs` rows of one shape that this thread works on. Where `held` they are read
// once; each() then goes over registers. Elements outside the row are fillers.
template <class scalar_t, int threads, bool held, int inputs>
struct RegisterTile {
  using real = real_of<scalar_t>;
  static constexpr int size = pack_size<scalar_t>;
  static constexpr int slots = held ? kHeld<scalar_t> / size : 1;
  using index_t = std::conditional_t<held, int, int64_t>;  // what is held is short
  using Values = real[inputs][size];

  Row<scalar_t, index_t> row;
  const scalar_t* p[inputs];
  bool wide;  // of the second input; the first is what the row was cut for
  real filler;
  int rank;
  Values v[slots];

  __device__ __forceinline__ RegisterTile(int64_t n, const scalar_t* first, const scalar_t* second,
                                          bool wide, real filler, int rank)
      : row(first, n), wide(wide), filler(filler), rank(rank) {
    p[0] = first;
    if constexpr (inputs == 2) p[1] = second;
    if constexpr (held) {
#pragma unroll
      for (int s = 0; s < slots; ++s)
        if (rank + s * threads < row.packs) read(rank + s * threads, v[s]);
    }
  }
  __device__ __forceinline__ void read(index_t pack, Values& values) const {
    const index_t i = row.first(pack);
    row.get(p[0], true, i, values[0], filler);
    if constexpr (inputs == 2) row.get(p[1], wide, i, values[1], filler);
  }
  // body(first element, values); what it leaves in the values stays there if `held`.
  template <class Body>
  __device__ __forceinline__ void each(Body body) {
    if constexpr (held) {
#pragma unroll
      for (int s = 0; s < slots; ++s)
        if (rank + s * threads < row.packs) body(row.first(rank + s * threads), v[s]);
    } else {
#pragma unroll 2
      for (int64_t pack = rank; pack < row.packs; pack += threads) {
        read(pack, v[0]);
        body(row.first(pack), v[0]);
      }
    }
  }
};

// The maximum of the row and the sum of exp(x - maximum). Each thread keeps its own maximum, and
// threads are joined once at the end: joining pack by pack costs twice the instructions. visitor(i,
// values, base) sees every pack with the base that the thread's exponentials have at that time.
// Where the row is held and `leave` is set, x becomes exp(x - maximum).
template <bool leave, int threads, class scalar_t, bool held, int inputs, class Visitor>
__device__ __forceinline__ LogSumExp<real_of<scalar_t>> online_softmax(
    RegisterTile<scalar_t, threads, held, inputs>& tile, const Team<threads>& team,
    Visitor visitor) {
  using real = real_of<scalar_t>;
  constexpr int size = pack_size<scalar_t>;
  LogSumExp<real> mine;
  const auto add = [&](auto i, auto& v, real base) {
    visitor(i, v, base);
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const real e = exp(v[0][k] - base);
      mine.sum += e;
      if constexpr (held && leave) v[0][k] = e;
    }
  };
  const auto peak_of = [&](auto& v) {
    real peak = mine.peak;
#pragma unroll
    for (int k = 0; k < size; ++k) peak = max(peak, v[0][k]);
    return peak;
  };
  if constexpr (held) {
    tile.each([&](auto, auto& v) { mine.peak = peak_of(v); });
    mine.peak = team.maximum(mine.peak);
    const real base = LogSumExp<real>::origin(mine.peak);
    tile.each([&](auto i, auto& v) { add(i, v, base); });
  } else {
    real base = LogSumExp<real>::origin(mine.peak);
    tile.each([&](auto i, auto& v) {
      const real peak = peak_of(v);
      if (peak != mine.peak) {
        base = LogSumExp<real>::origin(peak);
        mine.sum *= exp(mine.peak - base);
        mine.peak = peak;
      }
      add(i, v, base);
    });
    const real peak = team.maximum(mine.peak);
    mine.sum *= exp(mine.peak - LogSumExp<real>::origin(peak));
    mine.peak = peak;
  }
  mine.sum = team.sum(mine.sum);
  return mine;
}

// ------------------------------------------------------------------------------------------------
// kernels: softmax

// Row by row for teams of 32 threads, several in a block, or of the whole block.
template <int threads, class Body>
__device__ __forceinline__ void each_row(int64_t rows, Body body) {
  const int64_t teams = blockDim.x / threads, step = int64_t{gridDim.x} * teams;
  for (int64_t r = int64_t{blockIdx.x} * teams + threadIdx.x / threads; r < rows; r += step)
    body(r);
}

template <class Op, class scalar_t, int threads, bool held>
__global__ void __launch_bounds__(threads == kWarp ? kWarpBlock : threads, kResident)
    softmax_kernel(int64_t rows, int64_t n, const scalar_t* x, scalar_t* y, bool wide) {
  using real = real_of<scalar_t>;
  constexpr bool leave = Op::from_exponential;
  const Team<threads> team;
  each_row<threads>(rows, [&](int64_t r) {
    const real lowest = c<real>(-std::numeric_limits<double>::infinity());
    RegisterTile<scalar_t, threads, held, 1> tile(n, x + r * n, nullptr, true, lowest, team.rank);
    const LogSumExp<real> total = online_softmax<leave>(tile, team, [](auto, auto&, real) {});
    const real base = LogSumExp<real>::origin(total.peak), constant = Op::constant(total.sum);
    tile.each([&](auto i, auto& v) {
#pragma unroll
      for (real& u : v[0]) {
        if constexpr (leave && !held) u = exp(u - base);
        u = Op::forward(u, total.peak, constant);
      }
      tile.row.put(y + r * n, wide, i, v[0]);
    });
  });
}

template <class Op, class scalar_t, int threads, bool held>
__global__ void __launch_bounds__(threads == kWarp ? kWarpBlock : threads, kResident)
    softmax_backward_kernel(int64_t rows, int64_t n, const scalar_t* y, const scalar_t* dy,
                            scalar_t* dx, bool wide_dy, bool wide_dx) {
  using real = real_of<scalar_t>;
  const Team<threads> team;
  each_row<threads>(rows, [&](int64_t r) {
    RegisterTile<scalar_t, threads, held, 2> tile(n, y + r * n, dy + r * n, wide_dy, real(0),
                                                  team.rank);
    real total = 0;
    tile.each([&](auto, auto& v) {
#pragma unroll
      for (int k = 0; k < tile.size; ++k) total += Op::summand(v[0][k], v[1][k]);
    });
    total = team.sum(total);
    tile.each([&](auto i, auto& v) {
#pragma unroll
      for (int k = 0; k < tile.size; ++k) v[0][k] = Op::backward(v[0][k], v[1][k], total);
      tile.row.put(dx + r * n, wide_dx, i, v[0]);
    });
  });
}

// ------------------------------------------------------------------------------------------------
// kernels: columns

// A block takes `width` (a power of two, at most 32) neighbouring rows of (outer, n, inner), and
// kColumnBlock / width threads share each: thread t has column t % width and elements t / width, t
// / width + slices, ...
struct Tiles {
  int64_t outer, n, inner;
  int width;

  __host__ __device__ int64_t per_outer() const { return (inner + width - 1) / width; }
  // body(index of the row among outer * inner, offset of its first element, whether there is such a
  // row)
  template <class Body>
  __device__ __forceinline__ void each(Body body) const {
    const int64_t count = outer * per_outer();
    for (int64_t tile = blockIdx.x; tile < count; tile += gridDim.x) {
      const int64_t o = tile / per_outer();
      const int64_t i = tile % per_outer() * width + threadIdx.x % width;
      body(o * inner + i, o * n * inner + i, i < inner);
    }
  }
  __device__ __forceinline__ int64_t first() const { return threadIdx.x / width; }
  __device__ __forceinline__ int64_t slices() const { return kColumnBlock / width; }

  // Joins the values of the threads of each column; all of them get the result.
  template <class T, class F>
  __device__ __forceinline__ T join(T value, F f) const {
    FASTOPS_SHARED(T, each_thread, kColumnBlock);
    const int t = static_cast<int>(threadIdx.x);
    __syncthreads();  // the last join may still be read
    each_thread[t] = value;
    __syncthreads();
    for (int half = kColumnBlock / 2; half >= width; half /= 2) {
      if (t < half) each_thread[t] = f(each_thread[t], each_thread[t + half]);
      __syncthreads();
    }
    return each_thread[t % width];
  }
  template <class T>
  __device__ __forceinline__ T sum(T value) const {
    return join(value, [](T a, T b) { return a + b; });
  }
  template <class T>
  __device__ __forceinline__ T maximum(T value) const {
    return join(value, [](T a, T b) { return max(a, b); });
  }
};

template <class scalar_t, class Visitor>
__device__ __forceinline__ LogSumExp<real_of<scalar_t>> online_softmax_of_column(const Tiles& tiles,
                                                                                 const scalar_t* x,
                                                                                 bool live,
                                                                                 Visitor visitor) {
  using real = real_of<scalar_t>;
  LogSumExp<real> mine;
  real base = LogSumExp<real>::origin(mine.peak);
  for (int64_t j = tiles.first(); live && j < tiles.n; j += tiles.slices()) {
    const real u = static_cast<real>(load(x + j * tiles.inner)), peak = max(mine.peak, u);
    if (peak != mine.peak) {
      base = LogSumExp<real>::origin(peak);
      mine.sum *= exp(mine.peak - base);
      mine.peak = peak;
    }
    visitor(j, u, base);
    mine.sum += exp(u - base);
  }
  const real peak = tiles.maximum(mine.peak);
  mine.sum = tiles.sum(mine.sum * exp(mine.peak - LogSumExp<real>::origin(peak)));
  mine.peak = peak;
  return mine;
}

template <class Op, class scalar_t>
__global__ void __launch_bounds__(kColumnBlock, kResident)
    softmax_columns_kernel(Tiles tiles, const scalar_t* x, scalar_t* y) {
  using real = real_of<scalar_t>;
  tiles.each([&](int64_t, int64_t offset, bool live) {
    const LogSumExp<real> total =
        online_softmax_of_column(tiles, x + offset, live, [](int64_t, real, real) {});
    const real base = LogSumExp<real>::origin(total.peak), constant = Op::constant(total.sum);
    for (int64_t j = tiles.first(); live && j < tiles.n; j += tiles.slices()) {
      const int64_t at = offset + j * tiles.inner;
      real u = static_cast<real>(load(x + at));
      if constexpr (Op::from_exponential) u = exp(u - base);
      store(y + at, static_cast<scalar_t>(Op::forward(u, total.peak, constant)));
    }
  });
}

template <class Op, class scalar_t>
__global__ void __launch_bounds__(kColumnBlock, kResident)
    softmax_columns_backward_kernel(Tiles tiles, const scalar_t* y, const scalar_t* dy,
                                    scalar_t* dx) {
  using real = real_of<scalar_t>;
  tiles.each([&](int64_t, int64_t offset, bool live) {
    real total = 0;
    for (int64_t j = tiles.first(); live && j < tiles.n; j += tiles.slices()) {
      const int64_t at = offset + j * tiles.inner;
      total += Op::summand(static_cast<real>(load(y + at)), static_cast<real>(load(dy + at)));
    }
    total = tiles.sum(total);
    for (int64_t j = tiles.first(); live && j < tiles.n; j += tiles.slices()) {
      const int64_t at = offset + j * tiles.inner;
      const real u = static_cast<real>(load(y + at)), g = static_cast<real>(load(dy + at));
      store(dx + at, static_cast<scalar_t>(Op::backward(u, g, total)));
    }
  });
}

// ------------------------------------------------------------------------------------------------
// kernels: cross-entropy

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
  // What finish() leaves, of a row that is ignored.
  __device__ __forceinline__ void ignore(int64_t r, real nothing) const {
    store(loss + r, nothing);
    if (lse) store(lse + r, real(0));
  }
  // Leaves row r's loss, to which z_loss is still to be added, and its log(sum(exp(x))), which is
  // `value`.
  template <class Op>
  __device__ __forceinline__ void finish(int64_t r, real loss_of_row, real value) const {
    store(loss + r, z == real(0) ? loss_of_row : loss_of_row + Op::z_loss(value, z));
    if (lse) store(lse + r, value);
  }
  // What z_loss adds to `total` of the gradient.
  template <class Op>
  __device__ __forceinline__ real slope(real value) const {
    return z == real(0) ? real(0) : Op::z_slope(value, z);
  }
  // Target m of row r, which is ignore_index or a class.
  __device__ __forceinline__ int64_t at(int64_t r, int m = 0) const {
    const int64_t t = load(index[m] + r);
    if (t != ignore_index && (t < 0 || t >= classes)) out_of_range(t, r, classes, ignore_index);
    return t;
  }
};

// What the classes of row r, one or two, ask of its kernel; a class that is ignored, or that there
// is not, is -1.
template <class scalar_t>
struct Classes {
  using real = real_of<scalar_t>;
  int64_t t[2] = {-1, -1};
  real hard[2] = {}, x[2] = {};
  real share = 0,
       nothing = 0;  // share: the sum of those of the classes not ignored; nothing: 0, or NaN
  bool live = false;

  // The row's elements are `stride` apart. Reads no target where there is no such row.
  __device__ __forceinline__ Classes(const Targets<scalar_t>& q, int64_t r, const scalar_t* row,
                                     int64_t stride, bool exists = true) {
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
        x[m] = static_cast<real>(load(row + at * stride));
      }
    }
  }
  // Takes from the gradient of class j what is less at the targets.
  __device__ __forceinline__ void subtract(real& dx, int64_t j, real scale) const {
#pragma unroll
    for (int m = 0; m < 2; ++m)
      if (j == t[m]) dx -= hard[m] * scale;
  }
};

template <class real, class Everyone>
__device__ __forceinline__ void join(Expectation<real>& of, const Everyone& everyone, real base) {
  of.move(base);
  of.mass = everyone.sum(of.mass);
  of.depth = everyone.sum(of.depth);
}

template <class Op, class real, class scalar_t>
__device__ __forceinline__ real loss_of(LogSumExp<real> total, real log_sum,
                                        const Classes<scalar_t>& of, real soft,
                                        const Expectation<real>& smooth) {
  real loss = of.nothing;
#pragma unroll
  for (int m = 0; m < 2; ++m)
    if (of.t[m] >= 0) loss += Op::loss(log_sum, total.peak, of.x[m], of.hard[m]);
  return soft == real(0) ? loss : loss + Op::smooth_loss(log_sum, smooth.depth, smooth.mass, soft);
}

// grad may be x.
template <class Op, class scalar_t, int threads, bool held>
__global__ void __launch_bounds__(threads == kWarp ? kWarpBlock : threads, kResident)
    cross_entropy_kernel(int64_t rows, int64_t n, const scalar_t* x, scalar_t* grad, bool wide,
                         Targets<scalar_t> targets) {
  using real = real_of<scalar_t>;
  constexpr int size = pack_size<scalar_t>;
  const Team<threads> team;
  const bool smoothing = targets.soft != real(0);
  each_row<threads>(rows, [&](int64_t r) {
    const Classes<scalar_t> of(targets, r, x + r * n, 1);
    if (!of.live) {  // the whole team agrees
      if (team.rank == 0) targets.ignore(r, of.nothing);
      if (!grad) return;
      const Row<scalar_t, int64_t> row(x + r * n, n);
      const real zeros[size] = {};
      for (int64_t pack = team.rank; pack < row.packs; pack += threads)
        row.put(grad + r * n, wide, row.first(pack), zeros);
      return;
    }
    const real lowest = c<real>(-std::numeric_limits<double>::infinity());
    RegisterTile<scalar_t, threads, held, 1> tile(n, x + r * n, nullptr, true, lowest, team.rank);
    Expectation<real> smooth;
    const LogSumExp<real> total = online_softmax<true>(tile, team, [&](auto i, auto& v, real base) {
      if (!smoothing) return;
      smooth.move(base);
#pragma unroll
      for (int k = 0; k < size; ++k)
        if (tile.row.has(i + k)) smooth.add(targets.weight_of(i + k), v[0][k]);
    });
    const real base = LogSumExp<real>::origin(total.peak);
    if (smoothing) join(smooth, team, base);
    const real log_sum = log(total.sum), soft_part = of.share * targets.soft;
    if (team.rank == 0)
      targets.template finish<Op>(r, loss_of<Op>(total, log_sum, of, soft_part, smooth),
                                  total.peak + log_sum);
    if (!grad) return;

    team.sync();  // x[t] has been read by all before grad, which may be x, is written
    const real scale = targets.gradient_scale(), inverse = real(1) / total.sum;
    const real slope = targets.template slope<Op>(total.peak + log_sum);
    const real all = (of.hard[0] + of.hard[1] + soft_part * smooth.mass + slope) * scale,
               soft = soft_part * scale;
    tile.each([&](auto i, auto& v) {
#pragma unroll
      for (int k = 0; k < size; ++k) {
        const real e = held ? v[0][k] : exp(v[0][k] - base);
        real soft_weight = soft;
        if (smoothing && tile.row.has(i + k)) soft_weight = soft * targets.weight_of(i + k);
        v[0][k] = Op::gradient(e * inverse, all, soft_weight);
        of.subtract(v[0][k], i + k, scale);
      }
      tile.row.put(grad + r * n, wide, i, v[0]);
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
    const Classes<scalar_t> of(targets, r, x + offset, tiles.inner, exists);
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
    const real log_sum = log(total.sum), soft_part = of.share * targets.soft;
    if (exists && tiles.first() == 0) {
      if (live) {
        targets.template finish<Op>(r, loss_of<Op>(total, log_sum, of, soft_part, smooth),
                                    total.peak + log_sum);
      } else {
        targets.ignore(r, of.nothing);
      }
    }
    if (!grad) return;
    const real scale = targets.gradient_scale(), inverse = real(1) / total.sum;
    const real slope = targets.template slope<Op>(total.peak + log_sum);
    const real all = (of.hard[0] + of.hard[1] + soft_part * smooth.mass + slope) * scale,
               soft = soft_part * scale;
    for (int64_t j = tiles.first(); exists && j < tiles.n; j += tiles.slices()) {
      const int64_t at = offset + j * tiles.inner;
      real dx = 0;
      if (live) {
        const real e = exp(static_cast<real>(load(x + at)) - base);
        dx = Op::gradient(e * inverse, all, smoothing ? soft * targets.weight_of(j) : soft);
        of.subtract(dx, j, scale);
      }
      store(grad + at, static_cast<scalar_t>(dx));
    }
  });
}

// As cross_entropy_kernel, with a distribution per row. grad may be x.
template <class Op, class scalar_t, int threads, bool held>
__global__ void __launch_bounds__(threads == kWarp ? kWarpBlock : threads, kResident)
    probability_kernel(int64_t rows, int64_t n, const scalar_t* x, scalar_t* grad, bool wide_q,
                       bool wide_grad, Targets<scalar_t> targets) {
  using real = real_of<scalar_t>;
  const Team<threads> team;
  each_row<threads>(rows, [&](int64_t r) {
    const real lowest = c<real>(-std::numeric_limits<double>::infinity());
    RegisterTile<scalar_t, threads, held, 2> tile(n, x + r * n, targets.probability + r * n, wide_q,
                                                  lowest, team.rank);
    Expectation<real> of;
    const LogSumExp<real> total = online_softmax<true>(tile, team, [&](auto i, auto& v, real base) {
      of.move(base);
#pragma unroll
      for (int k = 0; k < tile.size; ++k) {
        if (!tile.row.has(i + k)) continue;
        if constexpr (held) {
          v[1][k] = targets.mix(v[1][k], i + k);
          of.add(v[1][k], v[0][k]);
        } else {
          of.add(targets.mix(v[1][k], i + k), v[0][k]);
        }
      }
    });
    const real base = LogSumExp<real>::origin(total.peak);
    join(of, team, base);
    const real log_sum = log(total.sum), value = total.peak + log_sum;
    if (team.rank == 0)
      targets.template finish<Op>(r, Op::smooth_loss(log_sum, of.depth, of.mass, real(1)), value);
    if (!grad) return;

    const real scale = targets.gradient_scale(), inverse = real(1) / total.sum;
    const real all = (of.mass + targets.template slope<Op>(value)) * scale;
    tile.each([&](auto i, auto& v) {
#pragma unroll
      for (int k = 0; k < tile.size; ++k) {
        const real e = held ? v[0][k] : exp(v[0][k] - base);
        const real w = held || !tile.row.has(i + k) ? v[1][k] : targets.mix(v[1][k], i + k);
        v[0][k] = Op::gradient(e * inverse, all, w * scale);
      }
      tile.row.put(grad + r * n, wide_grad, i, v[0]);
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
    const real log_sum = log(total.sum), value = total.peak + log_sum;
    if (live && tiles.first() == 0)
      targets.template finish<Op>(r, Op::smooth_loss(log_sum, of.depth, of.mass, real(1)), value);
    if (!grad) return;
    const real scale = targets.gradient_scale(), inverse = real(1) / total.sum;
    const real all = (of.mass + targets.template slope<Op>(value)) * scale;
    for (int64_t j = tiles.first(); live && j < tiles.n; j += tiles.slices()) {
      const int64_t at = offset + j * tiles.inner;
      const real e = exp(static_cast<real>(load(x + at)) - base);
      store(grad + at, static_cast<scalar_t>(Op::gradient(e * inverse, all, mixed(j) * scale)));
    }
  });
}

// A block per kDivisorRows rows, whose sums join_divisor_kernel adds, one after the other: the
// order of summation is the same in every run.
template <class scalar_t>
__global__ void __launch_bounds__(kRowBlock, kResident)
    divisor_kernel(int64_t rows, int64_t each, Targets<scalar_t> targets, real_of<scalar_t>* out) {
  double sum = 0;
  const int64_t begin = blockIdx.x * each, end = begin + each < rows ? begin + each : rows;
  for (int64_t r = begin + threadIdx.x; r < end; r += kRowBlock) {
    const int64_t t = targets.at(r);
    if (t != targets.ignore_index) sum += static_cast<double>(targets.weight_of(t));
  }
  sum = Team<kRowBlock>().sum(sum);
  if (threadIdx.x == 0) store(out + blockIdx.x, static_cast<real_of<scalar_t>>(sum));
}

template <class real>
__global__ void __launch_bounds__(kRowBlock, kResident)
    join_divisor_kernel(int64_t count, const real* part, real* out) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < count; k += kRowBlock)
    sum += static_cast<double>(load(part + k));
  sum = Team<kRowBlock>().sum(sum);
  if (threadIdx.x == 0) store(out, static_cast<real>(sum));
}

// ------------------------------------------------------------------------------------------------
// launchers

// Who takes rows of n elements, the first at x: run(threads of the team, whether they hold it).
template <class scalar_t, class Run>
Error by_length(int64_t n, const scalar_t* x, Run run) {
  constexpr int64_t held = kHeld<scalar_t>, size = pack_size<scalar_t>;
  const int64_t spare =
      aligned(x) && n % size == 0 ? 0 : size - 1;  // for a row that starts within a pack
  if (n + spare <= kWarp * held) return run(std::integral_constant<int, kWarp>{}, std::true_type{});
  if (n + spare <= kRowBlock * held)
    return run(std::integral_constant<int, kRowBlock>{}, std::true_type{});
  return run(std::integral_constant<int, kLongRowBlock<scalar_t>>{}, std::false_type{});
}

template <int threads, class... Parameters, class... Arguments>
Error launch_rows(void (*kernel)(Parameters...), void* stream, int64_t rows,
                  Arguments... arguments) {
  constexpr int block = threads == kWarp ? kWarpBlock : threads, teams = block / threads;
  const int64_t blocks = std::min<int64_t>((rows + teams - 1) / teams, INT32_MAX);
  return launch(kernel, blocks, block, stream, rows, arguments...);
}

template <class... Parameters, class... Arguments>
Error launch_columns(void (*kernel)(Parameters...), void* stream, int64_t outer, int64_t n,
                     int64_t inner, Arguments... arguments) {
  Tiles tiles{outer, n, inner, 1};
  while (tiles.width < kWarp && tiles.width < inner) tiles.width *= 2;
  const int64_t blocks = std::min<int64_t>(outer * tiles.per_outer(), INT32_MAX);
  return launch(kernel, blocks, kColumnBlock, stream, tiles, arguments...);
}

template <class Op>
Error softmax(const SoftmaxArgs& a) {
  if (a.outer * a.n * a.inner == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    auto* x = static_cast<const scalar_t*>(a.in[0]);
    auto* y = static_cast<scalar_t*>(a.out);
    if (a.inner > 1)
      return launch_columns(softmax_columns_kernel<Op, scalar_t>, a.stream, a.outer, a.n, a.inner,
                            x, y);
    return by_length<scalar_t>(a.n, x, [&](auto threads, auto held) {
      return launch_rows<threads>(softmax_kernel<Op, scalar_t, threads, held>, a.stream, a.outer,
                                  a.n, x, y, same_alignment<scalar_t>(x, y));
    });
  });
}

template <class Op>
Error softmax_backward(const SoftmaxArgs& a) {
  if (a.outer * a.n * a.inner == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    auto* y = static_cast<const scalar_t*>(a.in[0]);
    auto* dy = static_cast<const scalar_t*>(a.in[1]);
    auto* dx = static_cast<scalar_t*>(a.out);
    if (a.inner > 1)
      return launch_columns(softmax_columns_backward_kernel<Op, scalar_t>, a.stream, a.outer, a.n,
                            a.inner, y, dy, dx);
    return by_length<scalar_t>(a.n, y, [&](auto threads, auto held) {
      return launch_rows<threads>(softmax_backward_kernel<Op, scalar_t, threads, held>, a.stream,
                                  a.outer, a.n, y, dy, dx, same_alignment(y, dy),
                                  same_alignment<scalar_t>(y, dx));
    });
  });
}

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
    return by_length<scalar_t>(a.n, x, [&](auto threads, auto held) {
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
    return by_length<scalar_t>(a.n, x, [&](auto threads, auto held) {
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
    const Error error = launch(divisor_kernel<scalar_t>, blocks, kRowBlock, a.stream, rows, each,
                               targets_of<scalar_t>(a), part);
    if (error || blocks == 1) return error;
    return launch(join_divisor_kernel<real>, 1, kRowBlock, a.stream, blocks, part, out);
  });
}

// ------------------------------------------------------------------------------------------------
// tables

template <class Op>
struct MakeSoftmax {
  static constexpr SoftmaxKernel row{Op::name, &softmax<Op>, &softmax_backward<Op>};
};
template <class Op>
struct MakeCrossEntropy {
  static constexpr CrossEntropyKernel row{Op::name, &cross_entropy<Op>,
                                          &cross_entropy_probability<Op>, &divisor};
};
using SoftmaxTable = Table<SoftmaxKernel, MakeSoftmax, Softmaxes>;
using CrossEntropyTable = Table<CrossEntropyKernel, MakeCrossEntropy, CrossEntropies>;

}  // namespace

extern constinit const KernelTable<SoftmaxKernel> softmax_kernels{SoftmaxTable::rows,
                                                                  std::size(SoftmaxTable::rows)};
extern constinit const KernelTable<CrossEntropyKernel> cross_entropy_kernels{
    CrossEntropyTable::rows, std::size(CrossEntropyTable::rows)};

}  // namespace fastops::cuda
