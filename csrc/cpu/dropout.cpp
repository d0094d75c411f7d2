// Dropout: words from the counter-based generator, keep or drop. The word of an element depends on
// the seed and its logical index alone, so any split over threads, vectors and memory layouts gives
// the same mask.
#include "../formulas/dropout.h"
#include "../kernels/dropout.h"
#include "elementwise.h"
#include "vec_philox.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 4096;

struct Key {
  uint32_t k0, k1;
  FASTOPS_FN explicit Key(int64_t seed)
      : k0(static_cast<uint32_t>(seed)), k1(static_cast<uint32_t>(seed >> 32)) {}
  FASTOPS_FN Philox<U32> operator()(U32 c0, U32 c1) const { return {c0, c1, k0, k1}; }
};

// Walks the elements in memory order and tells where each stands in logical order.
struct LogicalWalk {
  const LogicalOrder& order;
  int64_t at[kMaxDims], logical = 0;
  FASTOPS_FN LogicalWalk(const LogicalOrder& order, int64_t position) : order(order) {
    for (int d = order.dims - 1; d >= 0; --d) {
      at[d] = position % order.size[d];
      position /= order.size[d];
      logical += at[d] * order.logical_stride[d];
    }
  }
  FASTOPS_FN void next() {
    for (int d = order.dims - 1; d >= 0; --d) {
      logical += order.logical_stride[d];
      if (++at[d] < order.size[d]) return;
      logical -= at[d] * order.logical_stride[d];
      at[d] = 0;
    }
  }
};

// The words of the next `count` <= kSpan elements in memory order, each from a counter of its own.
FASTOPS_FN void walked_words(Key key, LogicalWalk& walk, int64_t count, uint32_t* word) {
  uint32_t low[kSpan] = {}, high[kSpan] = {}, which[kSpan] = {};
  for (int64_t k = 0; k < count; ++k, walk.next()) {
    const uint64_t counter = static_cast<uint64_t>(walk.logical) / 4;
    low[k] = static_cast<uint32_t>(counter);
    high[k] = static_cast<uint32_t>(counter >> 32);
    which[k] = static_cast<uint32_t>(walk.logical % 4);
  }
  for (int64_t k = 0; k < count; k += U32::lanes) {
    Philox<U32> philox(U32::load(low + k), U32::load(high + k), key.k0, key.k1);
    uint32_t lane[4][U32::lanes];
    for (int j = 0; j < 4; ++j) philox.word[j].store(lane[j]);
    for (int l = 0; l < U32::lanes; ++l) word[k + l] = lane[which[k + l]][l];
  }
}

// Which of the words of one vector of real are at or above the threshold, as a mask of that vector.
template <class real>
FASTOPS_FN Vec<real> at_least(const uint32_t* word, uint32_t threshold) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<real, float>) {
    return _mm512_castsi512_ps(_mm512_movm_epi32(_mm512_cmpge_epu32_mask(
        _mm512_loadu_si512(word), _mm512_set1_epi32(static_cast<int>(threshold)))));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<real, float>) {
    const __m256i w = U32::load(word).v, t = U32(threshold).v;
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(w, t), w));
  }
#endif
  real above[Vec<real>::size()];
  for (int k = 0; k < Vec<real>::size(); ++k) above[k] = word[k] >= threshold ? real(1) : real(0);
  return Vec<real>::loadu(above) > Vec<real>(real(0));
}

// The sums of rows of `period` elements, a block of rows at a time, into which vectors are added
// one after the other.
template <class L>
struct RunningSums {
  using real = typename L::real;
  real* sum;  // of the block that the next element belongs to
  int64_t period, column = 0, row = 0;

  template <class N>
  FASTOPS_FN void add(N n, const typename L::V (&v)[L::count]) {
    if (column + n <= period) {
      add_real<L>(sum + column, n, v);
      return advance(n);
    }
    real lane[L::size];
    store_real<L>(lane, n, v);
    for (int64_t k = 0; k < n; ++k) {
      sum[column] += lane[k];
      advance(1);
    }
  }
  FASTOPS_FN void advance(int64_t columns) {
    column += columns;
    if (column < period) return;
    column = 0;
    if (++row % kRowBlock == 0) sum += period;
  }
};

template <class Op>
struct MakeDropout {
  static_assert(Op::inputs == 1 || Op::inputs == 3);

  static Error forward(const DropoutArgs& a) { return over<false>(a); }
  static Error forward_summed(const DropoutArgs& a) { return over<true>(a); }

  template <bool summed>
  static Error over(const DropoutArgs& a) {
    return dispatch(a.dtype, [&](auto zero) -> Error {
      using scalar_t = decltype(zero);
      using L = VecIO<scalar_t>;
      using V = typename L::V;
      using real = typename L::real;
      const Key key(*a.seed);
      const uint32_t threshold = a.threshold;
      const V scale(static_cast<real>(a.scale));
      auto* out = static_cast<scalar_t*>(a.out);
      Operands<scalar_t, Op::inputs, Op::inputs == 3 ? 0b010 : 0> operands;
      for (int k = 0; k < Op::inputs; ++k) operands.in[k] = {static_cast<const scalar_t*>(a.in[k])};
      if constexpr (Op::inputs == 3) operands.in[1].period = a.period;
      const int64_t period = a.period;
      const bool contiguous = a.order.dims == 1 && a.order.logical_stride[0] == 1;
      const int64_t total = a.n;
      const bool stream =
          operands.template whole_vectors<L>() && streams<L>(out, total, operands.in[0].data);
      const LogicalOrder& order = a.order;
      // The spans of [begin, end), which begin where `sums` do.
      const auto spans = [=, &order](int64_t begin, int64_t end,
                                     [[maybe_unused]] RunningSums<L> sums) {
        const U32 offsets = lane_offsets();
        LogicalWalk walk(order, begin * kSpan);
        for (int64_t span = begin; span < end; ++span) {
          const int64_t first = span * kSpan, last = first + kSpan < total ? first + kSpan : total;
          uint32_t word[kSpan + L::size];  // a vector may begin anywhere in the span
          if (contiguous) {
            contiguous_words(key, offsets, first, word);
          } else {
            walked_words(key, walk, last - first, word);
          }
          operands.template for_each_vector<L>(first, last, [&](int64_t i, auto n, auto& x) {
            for (int k = 0; k < L::count; ++k) {
              const auto keep = at_least<real>(word + (i - first) + k * V::size(), threshold);
              if constexpr (Op::inputs == 1) x[0][k] = Op::forward(keep, scale, x[0][k]);
              if constexpr (Op::inputs == 3)
                x[0][k] = Op::forward(keep, scale, x[0][k], x[1][k], x[2][k]);
            }
            if constexpr (summed) sums.add(n, x[0]);
            L::store(out + i, n, x[0], stream);
          });
        }
        if (stream) fence();
      };
      if constexpr (summed) {
        int64_t rows = kRowBlock;  // after which a block and a span begin together
        while (rows * period % kSpan != 0) rows *= 2;
        auto* sums = static_cast<real*>(a.sums);
        const int64_t elements = rows * period;
        cpu::parallel((total + elements - 1) / elements, kGrain / elements + 1,
                      [=](int64_t begin, int64_t end) {
                        const int64_t first = begin * elements,
                                      last = end * elements < total ? end * elements : total;
                        real* const blocks = sums + first / kRowBlock;
                        for (int64_t j = 0; j < row_blocks_of((last - first) / period) * period;
                             ++j)
                          blocks[j] = 0;
                        spans(first / kSpan, (last + kSpan - 1) / kSpan, {blocks, period});
                      });
      } else {
        cpu::parallel((total + kSpan - 1) / kSpan, kGrain / kSpan,
                      [=](int64_t begin, int64_t end) { spans(begin, end, {}); });
      }
      return nullptr;
    });
  }
  static Error backward(const DropoutArgs& a) {
    return dispatch(a.dtype, [&](auto zero) -> Error {
      using scalar_t = decltype(zero);
      using V = typename VecIO<scalar_t>::V;
      const V scale(static_cast<typename VecIO<scalar_t>::real>(a.scale));
      const Result<scalar_t> out[] = {{static_cast<scalar_t*>(a.out)}};
      const Operand<scalar_t> in[] = {{static_cast<const scalar_t*>(a.in[0])},
                                      {static_cast<const scalar_t*>(a.in[1])}};
      elementwise(a.n, out, in, [=](V y, V dy) { return Op::backward(y, dy, scale); });
      return nullptr;
    });
  }
  static constexpr DropoutKernel make_kernel() {
    DropoutKernel kernel{Op::name, Op::inputs, &forward, nullptr, nullptr};
    if constexpr (Op::from_output) kernel.backward = &backward;
    if constexpr (Op::own_derivative) kernel.summed = &forward_summed;
    return kernel;
  }
  static constexpr DropoutKernel kernel = make_kernel();
};
using DropoutTable = Table<DropoutKernel, MakeDropout, Dropouts>;

}  // namespace

extern constinit const KernelTable<DropoutKernel> dropout_kernels{DropoutTable::kernels,
                                                                  std::size(DropoutTable::kernels)};

}  // namespace fastops::CPU_CAPABILITY
