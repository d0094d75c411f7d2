// Dropout: words from the counter-based generator, keep or drop. The word of an element depends on
// the seed and its logical index alone, so the mask is the CPU's, bit for bit, for any grid,
// alignment and memory layout.
#include "../formulas/dropout.h"
#include "../kernels/dropout.h"
#include "column_sums.cuh"
#include "elementwise.cuh"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = 4;  // of one counter

// As many consecutive elements as fill a pack, and at least those of one counter.
template <class scalar_t>
constexpr int group_size = pack_size<scalar_t> > kWords ? pack_size<scalar_t> : kWords;

// ------------------------------------------------------------------------------------------------
// words

__device__ __forceinline__ uint32_t word_of(const Philox<uint32_t>& philox, int which) {
  const uint32_t low = which & 1 ? philox.word[1] : philox.word[0];
  const uint32_t high = which & 1 ? philox.word[3] : philox.word[2];
  return which & 2 ? high : low;
}

// What decides which elements are kept, once the seed is known.
struct Mask {
  uint32_t k0, k1, threshold;
  __device__ __forceinline__ Mask(const int64_t* seed, uint32_t threshold) : threshold(threshold) {
    const int64_t s = load(seed);
    k0 = static_cast<uint32_t>(s);
    k1 = static_cast<uint32_t>(s >> 32);
  }
  __device__ __forceinline__ Philox<uint32_t> words(uint64_t counter) const {
    return {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), k0, k1};
  }
  // Of the logical element i alone.
  __device__ __forceinline__ bool keeps(int64_t i) const {
    const auto at = static_cast<uint64_t>(i);
    return word_of(words(at / kWords), static_cast<int>(at % kWords)) >= threshold;
  }
  // Of n elements from i on: one, or those of whole counters.
  template <int n>
  __device__ __forceinline__ void keeps(int64_t i, bool (&keep)[n]) const {
    if constexpr (n == 1) {
      keep[0] = keeps(i);
    } else {
      static_assert(n % kWords == 0);
#pragma unroll
      for (int j = 0; j < n; j += kWords) {
        const Philox<uint32_t> philox = words(static_cast<uint64_t>(i + j) / kWords);
#pragma unroll
        for (int k = 0; k < kWords; ++k) keep[j + k] = philox.word[k] >= threshold;
      }
    }
  }
};

template <class Op, class real, int n>
__device__ __forceinline__ void keep_or_drop(const bool (&keep)[n], real scale,
                                             const real (&x)[Op::inputs][n], real (&y)[n]) {
#pragma unroll
  for (int k = 0; k < n; ++k) {
    if constexpr (Op::inputs == 1) y[k] = Op::forward(keep[k], scale, x[0][k]);
    if constexpr (Op::inputs == 3) y[k] = Op::forward(keep[k], scale, x[0][k], x[1][k], x[2][k]);
  }
}

// ------------------------------------------------------------------------------------------------
// contiguous tensors: neighbours share their counters

template <class Op>
struct Forward {
  static constexpr int inputs = Op::inputs, outputs = 1;
  static constexpr unsigned broadcast = inputs == 3 ? 0b10 : 0;
  template <class scalar_t>
  static constexpr int group = group_size<scalar_t>;

  template <class real>
  struct Masked {
    Mask mask;
    real scale;
    template <int n>
    __device__ __forceinline__ void operator()(int64_t i, const real (&x)[inputs][n],
                                               real (&y)[1][n]) const {
      bool keep[n];
      mask.keeps(i, keep);
      keep_or_drop<Op>(keep, scale, x, y[0]);
    }
  };
  template <class real>
  struct Functor {
    const int64_t* seed;
    uint32_t threshold;
    real scale;
    __device__ __forceinline__ Masked<real> prepared() const {
      return {Mask(seed, threshold), scale};
    }
  };
};

// From the output, which tells the mask.
template <class Op>
struct Backward {
  static constexpr int inputs = 2, outputs = 1, params = 1;
  template <class T>
  static FASTOPS_FN T apply(T y, T dy, T scale) {
    return Op::backward(y, dy, scale);
  }
};

template <class Op>
Error backward(const DropoutArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    std::array<Operand<scalar_t>, 2> in;
    for (int j = 0; j < 2; ++j) in[j].p = static_cast<const scalar_t*>(a.in[j]);
    return launch_elementwise<Backward<Op>, scalar_t>(a.n, {static_cast<scalar_t*>(a.out)}, in,
                                                      {Params<1, real_of<scalar_t>>(&a.scale)},
                                                      a.stream);
  });
}

// ------------------------------------------------------------------------------------------------
// tensors in any other order

template <class scalar_t, int inputs>
struct Inputs {
  const scalar_t* p[inputs];
  int64_t period;  // of the second of three
};

// The elements from i on, as many as there are up to n of them.
template <class Op, class scalar_t, int n>
__device__ __forceinline__ void load_some(const Inputs<scalar_t, Op::inputs>& in, int64_t i,
                                          int64_t count, bool wide,
                                          real_of<scalar_t> (&x)[Op::inputs][n]) {
#pragma unroll
  for (int j = 0; j < Op::inputs; ++j) {
    if (j == 1) {
#pragma unroll
      for (int k = 0; k < n; ++k)
        x[j][k] =
            k < count ? static_cast<real_of<scalar_t>>(load(in.p[j] + (i + k) % in.period)) : 0;
    } else if (wide) {
      load_wide(in.p[j] + i, x[j]);
    } else {
      load_narrow(in.p[j] + i, count, x[j]);
    }
  }
}

// Where the elements of memory stand in logical order, and how far a thread goes from one group of
// its elements to the next.
template <class index_t>
struct Strides {
  int dims;
  index_t size[kMaxDims], step[kMaxDims];
  int64_t stride[kMaxDims];
  int64_t carried[kMaxDims];  // what the logical index changes by where dimension d is carried
  int64_t logical_step;

  Strides(const LogicalOrder& order, int64_t elements) : dims(order.dims), logical_step(0) {
    for (int d = dims - 1; d >= 0; --d) {
      const int64_t outer = d > 0 ? order.logical_stride[d - 1] : 0;
      size[d] = static_cast<index_t>(order.size[d]);
      stride[d] = order.logical_stride[d];
      carried[d] = outer - order.size[d] * stride[d];
      step[d] = static_cast<index_t>(elements % order.size[d]);
      logical_step += elements % order.size[d] * stride[d];
      elements /= order.size[d];
    }
  }
};

template <class index_t>
struct Coordinates {
  index_t at[kMaxDims];
  int64_t logical = 0;

  __device__ __forceinline__ Coordinates(const Strides<index_t>& order, index_t i) {
#pragma unroll
    for (int d = kMaxDims - 1; d >= 0; --d) {
      if (d >= order.dims) continue;
      at[d] = i % order.size[d];
      i /= order.size[d];
      logical += static_cast<int64_t>(at[d]) * order.stride[d];
    }
  }
  __device__ __forceinline__ void move_one(const Strides<index_t>& order) {
    bool carry = true;
#pragma unroll
    for (int d = kMaxDims - 1; d >= 0; --d) {
      if (d >= order.dims || !carry) continue;
      if (d == order.dims - 1) logical += order.stride[d];
      add(order, d, 1, carry);
    }
  }
  __device__ __forceinline__ void move_step(const Strides<index_t>& order) {
    logical += order.logical_step;
    bool carry = false;
#pragma unroll
    for (int d = kMaxDims - 1; d >= 0; --d)
      if (d < order.dims) add(order, d, order.step[d] + carry, carry);
  }

 private:
  __device__ __forceinline__ void add(const Strides<index_t>& order, int d, index_t by,
                                      bool& carry) {
    at[d] += by;
    carry = at[d] >= order.size[d];
    if (!carry) return;
    at[d] -= order.size[d];
    logical += order.carried[d];
  }
};

// Every element has a counter of its own. A thread's coordinates are divided out once, and then
// moved along.
template <class Op, class scalar_t, class index_t>
__global__ void __launch_bounds__(kThreads, kResident)
    strided_kernel(int64_t n, scalar_t* out, Inputs<scalar_t, Op::inputs> in, bool wide,
                   const int64_t* seed, uint32_t threshold, real_of<scalar_t> scale,
                   const Strides<index_t> __grid_constant__ order) {
  using real = real_of<scalar_t>;
  constexpr int size = group_size<scalar_t>;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * size;
  if (first >= n) return;
  const Mask mask(seed, threshold);
  Coordinates<index_t> group(order, static_cast<index_t>(first));
  for (int64_t i = first; i < n; i += int64_t{gridDim.x} * kThreads * size) {
    const int64_t count = n - i < size ? n - i : size;
    bool keep[size];
    Coordinates<index_t> at = group;
#pragma unroll
    for (int k = 0; k < size; ++k) {
      keep[k] = mask.keeps(at.logical);
      at.move_one(order);
    }
    group.move_step(order);
    const bool whole = wide && count == size;
    real x[Op::inputs][size], y[size];
    load_some<Op>(in, i, count, whole, x);
    keep_or_drop<Op>(keep, scale, x, y);
    if (whole) {
      store_wide(out + i, y);
    } else {
      store_narrow(out + i, count, y);
    }
  }
}

template <class Op>
Error forward(const DropoutArgs& a) {
  static_assert(Op::inputs == 1 || Op::inputs == 3);
  if (a.n == 0) return nullptr;
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using real = real_of<scalar_t>;
    constexpr int size = group_size<scalar_t>;
    auto* out = static_cast<scalar_t*>(a.out);
    const auto scale = static_cast<real>(a.scale);
    if (a.order.dims == 1 && a.order.logical_stride[0] == 1) {
      std::array<Operand<scalar_t>, Op::inputs> in;
      for (int j = 0; j < Op::inputs; ++j) in[j].p = static_cast<const scalar_t*>(a.in[j]);
      if (Op::inputs == 3) in[Op::inputs / 2].period = a.period;
      return launch_elementwise<Forward<Op>, scalar_t>(a.n, {out}, in, {a.seed, a.threshold, scale},
                                                       a.stream);
    }
    Inputs<scalar_t, Op::inputs> in;
    for (int j = 0; j < Op::inputs; ++j) in.p[j] = static_cast<const scalar_t*>(a.in[j]);
    in.period = a.period;
    const bool wide = aligned(out, in.p[0], in.p[Op::inputs - 1]);
    const int64_t blocks = grid_for((a.n + size - 1) / size, kThreads);
    const auto run = [&](auto index) {
      using index_t = decltype(index);
      return launch(strided_kernel<Op, scalar_t, index_t>, blocks, kThreads, a.stream, a.n, out, in,
                    wide, a.seed, a.threshold, scale,
                    Strides<index_t>(a.order, blocks * kThreads * size));
    };
    return a.n < int64_t{1} << 31 ? run(uint32_t{}) : run(uint64_t{});
  });
}

// ------------------------------------------------------------------------------------------------
// contiguous rows whose sum is taken as well

template <class Op>
struct Summed {
  static constexpr int quantities = 1;
  template <class scalar_t>
  struct Rows {
    scalar_t* out;
    const scalar_t* in;
    const int64_t* seed;
    uint32_t threshold;
    real_of<scalar_t> scale;
  };
  template <class scalar_t, int n>
  struct Column {
    using real = real_of<scalar_t>;
    using Loaded = Raw<scalar_t, n>;
    const Rows<scalar_t>& of;
    Mask mask;
    __device__ __forceinline__ Column(const Rows<scalar_t>& of, int64_t)
        : of(of), mask(of.seed, of.threshold) {}
    __device__ __forceinline__ Loaded load(int64_t i) const {
      Loaded loaded;
      loaded.load_from(of.in + i);
      return loaded;
    }
    __device__ __forceinline__ void apply(const Loaded& loaded, int64_t i,
                                          real (&sum)[1][n]) const {
      bool keep[n];
      real x[1][n], y[n];
      loaded.values(x[0]);
      mask.keeps(i, keep);
      keep_or_drop<Op>(keep, of.scale, x, y);
#pragma unroll
      for (int k = 0; k < n; ++k) sum[0][k] += y[k];
      store_columns(of.out + i, y);
    }
  };
};

template <class Op>
Error summed(const DropoutArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using real = real_of<scalar_t>;
    const typename Summed<Op>::template Rows<scalar_t> rows{
        static_cast<scalar_t*>(a.out), static_cast<const scalar_t*>(a.in[0]), a.seed, a.threshold,
        static_cast<real>(a.scale)};
    return launch_summed<Summed<Op>, group_size<scalar_t>, scalar_t>(
        a.n, a.period, aligned(rows.out, rows.in), rows, {static_cast<real*>(a.sums)}, a.stream);
  });
}

// ------------------------------------------------------------------------------------------------
// table

template <class Op>
struct MakeDropout {
  static constexpr DropoutKernel make_kernel() {
    DropoutKernel kernel{Op::name, Op::inputs, &forward<Op>, nullptr, nullptr};
    if constexpr (Op::from_output) kernel.backward = &backward<Op>;
    if constexpr (Op::own_derivative) kernel.summed = &summed<Op>;
    return kernel;
  }
  static constexpr DropoutKernel kernel = make_kernel();
};
using DropoutTable = Table<DropoutKernel, MakeDropout, Dropouts>;

}  // namespace

extern constinit const KernelTable<DropoutKernel> dropout_kernels{DropoutTable::kernels,
                                                                  std::size(DropoutTable::kernels)};

}  // namespace fastops::cuda
