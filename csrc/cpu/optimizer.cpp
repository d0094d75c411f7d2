// The optimizer step over a list of tensors: all of them are cut into chunks, and one parallel
// region runs over the chunks, so that a thousand small tensors cost as much as one large one.
#include <cstring>

#include "../formulas/optimizers.h"
#include "../kernels/optimizer.h"
#include "parallel.h"
#include "vec_io.h"
#include "vec_philox.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kChunk = 16384;  // elements of one tensor that are worked on in one go
constexpr int64_t kAhead =
    256;  // elements ahead that are asked for: the processor by itself stops at the end of a page
constexpr int64_t kNext = 2;  // tensors ahead whose beginning is asked for
constexpr int64_t kGrain =
    65536;  // elements a thread takes at least: less is over before another has woken up

// What elements of T are computed in.
template <class T>
using Real = typename VecIO<T>::real;

// A group of IO::size elements of T, which is IO's dtype or what that is computed in.
template <class IO, class T, class N>
FASTOPS_FN void load_group(const T* p, N n, typename IO::V (&v)[IO::count]) {
  if constexpr (VecIO<T>::count == IO::count) {
    VecIO<T>::load(p, n, v);
  } else {
    load_real<IO>(p, n, v);
  }
}
template <class IO, class T, class N>
FASTOPS_FN void store_group(T* p, N n, const typename IO::V (&v)[IO::count]) {
  if constexpr (VecIO<T>::count == IO::count) {
    VecIO<T>::store(p, n, v);
  } else {
    store_real<IO>(p, n, v);
  }
}

// The words of one tensor's elements, a span at a time: one per element and pair of slots.
struct Words {
  static constexpr int pairs = (1 + kMaxStates + 1) / 2;
  Noise noise;
  U32 offsets = lane_offsets();
  int64_t span[pairs];
  uint32_t word[pairs][kSpan + 64];  // a group may be read past its end
  explicit FASTOPS_FN Words(const OptimizerNoise& n)
      : noise{static_cast<uint32_t>(n.seed), static_cast<uint32_t>(n.seed >> 32), n.step,
              n.number} {
    for (auto& s : span) s = -1;
  }
  // Those of element i and its successors in its span.
  FASTOPS_FN const uint32_t* at(int64_t i, int slot) {
    const int pair = slot / 2;
    if (span[pair] != i / kSpan) {
      span[pair] = i / kSpan;
      contiguous_words([&](U32 c0, U32 c1) { return noise.words(c0, c1, slot); }, offsets,
                       i / kSpan * kSpan, word[pair]);
    }
    return word[pair] + i % kSpan;
  }
};
// Of element i and its successors, in slot `slot`.
template <int count, class N>
FASTOPS_FN void store_stochastically(c10::BFloat16* p, int64_t i, N n, const Vec<float> (&v)[count],
                                     Words& words, int slot) {
  constexpr int size = count * Vec<float>::size();
  alignas(64) float value[size];
  for (int j = 0; j < count; ++j) v[j].store(value + j * Vec<float>::size());
  const uint32_t* word = words.at(i, slot);
  alignas(64) uint16_t rounded[size];
  for (int k = 0; k < size; ++k) {
    uint32_t bits;
    memcpy(&bits, value + k, sizeof bits);
    rounded[k] = static_cast<uint16_t>(round_stochastically(bits, word[k], slot));
  }
  memcpy(p + i, rounded, static_cast<size_t>(n) * sizeof *p);
}

// Elements [begin, end) of one tensor.
template <class Op, class scalar_t, class state_t, bool stochastic>
FASTOPS_FN void step_range(const OptimizerTensor& t, int64_t begin, int64_t end,
                           Real<scalar_t> inverse_scale, const OptimizerNoise* noise) {
  using real = Real<scalar_t>;
  using V = Vec<real>;
  // A group is a vector of the narrower dtype.
  using IO =
      std::conditional_t<sizeof(state_t) < sizeof(scalar_t), VecIO<state_t>, VecIO<scalar_t>>;
  constexpr int64_t size = IO::size;
  constexpr int count = IO::count;
  typename Op::template StepScalars<real> scalars;
  static_assert(sizeof scalars == scalars_of<Op> * sizeof(real));
  for (int k = 0; k < scalars_of<Op>; ++k)
    reinterpret_cast<real*>(&scalars)[k] = static_cast<real>(t.scalars[k]);
  auto* p = static_cast<scalar_t*>(t.p);
  auto* g = static_cast<const scalar_t*>(t.g);
  state_t* s[state_slots<Op>];
  for (int k = 0; k < Op::states; ++k) s[k] = static_cast<state_t*>(t.s[k]);
  auto* average = static_cast<real*>(t.average);
  const real weight = static_cast<real>(t.weight);
  const V scale(inverse_scale);
  const bool scaled = inverse_scale != real(1);
  // Stores elements i and on of what has slot `slot`. `words` is a Words where the rounding is
  // stochastic.
  auto put = [&](auto* to, int64_t i, auto n, const V(&v)[count], [[maybe_unused]] auto& words,
                 [[maybe_unused]] int slot) {
    if constexpr (stochastic && std::is_same_v<decltype(to), c10::BFloat16*>) {
      store_stochastically(to, i, n, v, words, slot);
    } else {
      store_group<IO>(to + i, n, v);
    }
  };
  auto group = [&](int64_t i, auto n, auto& words) {
    if (i + kAhead < end) {
      __builtin_prefetch(p + i + kAhead, 1);
      __builtin_prefetch(g + i + kAhead, 0);
      for (int k = 0; k < Op::states; ++k) __builtin_prefetch(s[k] + i + kAhead, 1);
    }
    V vp[count], vg[count], vs[state_slots<Op>][count];
    load_group<IO>(p + i, n, vp);
    load_group<IO>(g + i, n, vg);
    for (int k = 0; k < Op::states; ++k) load_group<IO>(s[k] + i, n, vs[k]);
    for (int j = 0; j < count; ++j) {
      if (scaled) vg[j] = vg[j] * scale;
      V state[state_slots<Op>];
      for (int k = 0; k < Op::states; ++k) state[k] = vs[k][j];
      Op::step(scalars, vp[j], vg[j], state);
      for (int k = 0; k < Op::states; ++k) vs[k][j] = state[k];
    }
    put(p, i, n, vp, words, 0);
    if (average) {
      load_group<IO>(average + i, n, vg);
      for (int j = 0; j < count; ++j) vg[j] = lerp(vg[j], vp[j], weight);
      store_group<IO>(average + i, n, vg);
    }
    for (int k = 0; k < Op::states; ++k) put(s[k], i, n, vs[k], words, 1 + k);
  };
  if constexpr (stochastic) {
    // Groups begin at multiples of their size, so that the words of one are of one span.
    Words words(*noise);
    static_assert(kSpan % size == 0);
    const int64_t aligned = (begin + size - 1) / size * size, head = aligned < end ? aligned : end;
    if (begin < head) group(begin, head - begin, words);
    for_each_vector<size, false>(head, end, [&](int64_t i, auto n) { group(i, n, words); });
  } else {
    int none = 0;
    for_each_vector<size>(begin, end, [&](int64_t i, auto n) { group(i, n, none); });
  }
}

// Asks for where a tensor begins: of small ones that is all there is, and the processor cannot
// guess where the next lies.
template <class Op, class scalar_t, class state_t>
FASTOPS_FN void expect(const OptimizerTensor& t) {
  const auto ask = [elements = t.n < kAhead ? t.n : kAhead](const void* data, size_t size) {
    const size_t bytes = static_cast<size_t>(elements) * size;
    for (size_t at = 0; at < bytes; at += 64)
      __builtin_prefetch(static_cast<const char*>(data) + at, 1);
  };
  ask(t.p, sizeof(scalar_t));
  ask(t.g, sizeof(scalar_t));
  for (int k = 0; k < Op::states; ++k) ask(t.s[k], sizeof(state_t));
}

template <class Op, class scalar_t, class state_t, bool stochastic = false>
void step_all(const OptimizerArgs& a) {
  using real = Real<scalar_t>;
  const real inverse_scale = a.grad_scale ? real(1) / static_cast<real>(*a.grad_scale) : real(1);
  int64_t total = 0;
  for (int64_t k = 0; k < a.count; ++k) total += a.tensors[k].n;
  const OptimizerTensor* tensors = a.tensors;
  const OptimizerNoise* noise = a.noise;
  const int64_t count = a.count;
  // The tensors, end to end, are one run of `total` elements; a thread takes a range of it, rounded
  // to whole chunks of a tensor, and finds the tensors in it by walking the list.
  const int64_t pieces = (total + kChunk - 1) / kChunk;
  cpu::parallel(pieces, kGrain / kChunk, [=](int64_t first, int64_t last) {
    const int64_t begin = first * kChunk, end = last * kChunk < total ? last * kChunk : total;
    int64_t offset = 0;
    for (int64_t k = 0; k < count && offset < end; offset += tensors[k].n, ++k) {
      const int64_t n = tensors[k].n;
      if (offset + n > begin && k + kNext < count)
        expect<Op, scalar_t, state_t>(tensors[k + kNext]);
      const int64_t from = begin > offset ? begin - offset : 0,
                    to = end - offset < n ? end - offset : n;
      if (from < to)
        step_range<Op, scalar_t, state_t, stochastic>(tensors[k], from, to, inverse_scale,
                                                      stochastic ? noise + k : nullptr);
    }
  });
}

template <class Op>
struct MakeOptimizer {
  static Error step(const OptimizerArgs& a) {
    if (a.on_device) return "the scalars of a step are made on the host";
    if (a.found_inf && *a.found_inf != 0.0f) return nullptr;
    return dispatch(a.dtype, [&](auto zero) -> Error {
      using scalar_t = decltype(zero);
      using c10::BFloat16;
      const bool own = a.state_dtype == a.dtype || Op::states == 0;
      constexpr bool reduced = VecIO<scalar_t>::reduced;
      const bool in_float = reduced && !own && a.state_dtype == c10::ScalarType::Float;
      const bool in_bfloat16 =
          std::is_same_v<scalar_t, float> && !own && a.state_dtype == c10::ScalarType::BFloat16;
      if constexpr (std::is_same_v<scalar_t, BFloat16>) {
        if (a.noise && own) return step_all<Op, BFloat16, BFloat16, true>(a), nullptr;
        if (a.noise && in_float) return step_all<Op, BFloat16, float, true>(a), nullptr;
      }
      if constexpr (std::is_same_v<scalar_t, float>) {
        if (in_bfloat16 && a.noise) return step_all<Op, float, BFloat16, true>(a), nullptr;
        if (in_bfloat16) return step_all<Op, float, BFloat16>(a), nullptr;
      }
      if (own) return step_all<Op, scalar_t, scalar_t>(a), nullptr;
      if constexpr (reduced)
        if (in_float) return step_all<Op, scalar_t, float>(a), nullptr;
      return "unsupported dtype of the optimizer state";
    });
  }
  static void scalars_for_step(const double* options, bool first, double* scalar_states,
                               unsigned in_double, double* scalars) {
    write_scalars<Op>(options, first, scalar_states, in_double, scalars);
  }
  static constexpr OptimizerKernel kernel = optimizer_kernel<Op>(&step, &scalars_for_step);
};
using OptimizerTable = Table<OptimizerKernel, MakeOptimizer, Optimizers>;

}  // namespace

extern constinit const KernelTable<OptimizerKernel> optimizer_kernels{
    OptimizerTable::kernels, std::size(OptimizerTable::kernels)};

}  // namespace fastops::CPU_CAPABILITY
