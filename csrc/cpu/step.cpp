// The optimizer step over a list of tensors: all of them are cut into chunks, and one parallel region runs over the
// chunks, so that a thousand small tensors cost as much as one large one.
#include <cstdlib>
#include <cstring>

#include "../formulas/optimizers.h"
#include "lanes.h"
#include "parallel.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kChunk = 16384;  // elements of one tensor that are worked on in one go
constexpr int64_t kGrain = 65536;  // elements a thread takes at least: less is over before another has woken up

// Elements [begin, end) of one tensor.
template <class Op, class scalar_t, class state_t>
FASTOPS_FN void step_range(const StepTensor& t, int64_t begin, int64_t end, typename Lanes<scalar_t>::real inverse_scale) {
  using L = Lanes<scalar_t>;
  using real = typename L::real;
  using V = typename L::V;
  typename Op::template Numbers<real> numbers;
  static_assert(sizeof numbers == Op::numbers * sizeof(real));
  for (int k = 0; k < Op::numbers; ++k)
    reinterpret_cast<real*>(&numbers)[k] = static_cast<real>(t.numbers[k]);
  auto* p = static_cast<scalar_t*>(t.p);
  auto* g = static_cast<const scalar_t*>(t.g);
  state_t* s[state_slots<Op>];
  for (int k = 0; k < Op::states; ++k) s[k] = static_cast<state_t*>(t.s[k]);
  auto* average = static_cast<real*>(t.average);
  const real weight = static_cast<real>(t.weight);
  const V scale(inverse_scale);
  const bool scaled = inverse_scale != real(1);
  groups<L::size>(begin, end, [&](int64_t i, auto n) {
    V vp[L::count], vg[L::count], vs[state_slots<Op>][L::count];
    L::load(p + i, n, vp);
    L::load(g + i, n, vg);
    for (int k = 0; k < Op::states; ++k) {
      if constexpr (std::is_same_v<state_t, scalar_t>) {
        L::load(s[k] + i, n, vs[k]);
      } else {
        for (int j = 0; j < L::count; ++j) {
          const int64_t from = j * V::size(), left = n - from;
          V one[1] = {V(real(0))};
          if (left > 0) Lanes<real>::load(s[k] + i + from, left < V::size() ? left : V::size(), one);
          vs[k][j] = one[0];
        }
      }
    }
    for (int j = 0; j < L::count; ++j) {
      if (scaled) vg[j] = vg[j] * scale;
      V state[state_slots<Op>];
      for (int k = 0; k < Op::states; ++k) state[k] = vs[k][j];
      Op::step(numbers, vp[j], vg[j], state);
      for (int k = 0; k < Op::states; ++k) vs[k][j] = state[k];
    }
    L::store(p + i, n, vp);
    if (average) {
      for (int j = 0; j < L::count; ++j) {
        const int64_t from = j * V::size(), left = n - from;
        if (left <= 0) continue;
        const int64_t m = left < V::size() ? left : V::size();
        V one[1];
        Lanes<real>::load(average + i + from, m, one);
        one[0] = lerp(one[0], vp[j], weight);
        Lanes<real>::store(average + i + from, m, one);
      }
    }
    for (int k = 0; k < Op::states; ++k) {
      if constexpr (std::is_same_v<state_t, scalar_t>) {
        L::store(s[k] + i, n, vs[k]);
      } else {
        for (int j = 0; j < L::count; ++j) {
          const int64_t from = j * V::size(), left = n - from;
          const V one[1] = {vs[k][j]};
          if (left > 0) Lanes<real>::store(s[k] + i + from, left < V::size() ? left : V::size(), one);
        }
      }
    }
  });
}

template <class Op, class scalar_t, class state_t>
void step_all(const StepArgs& a) {
  using real = typename Lanes<scalar_t>::real;
  const real inverse_scale = a.grad_scale ? real(1) / static_cast<real>(*a.grad_scale) : real(1);
  int64_t total = 0;
  for (int64_t k = 0; k < a.count; ++k) total += a.tensors[k].n;
  const StepTensor* tensors = a.tensors;
  const int64_t count = a.count;
  // The tensors, end to end, are one run of `total` elements; a thread takes a range of it, rounded to whole chunks of
  // a tensor, and finds the tensors in it by walking the list.
  const int64_t pieces = (total + kChunk - 1) / kChunk;
  cpu::parallel(pieces, kGrain / kChunk, [=](int64_t first, int64_t last) {
    const int64_t begin = first * kChunk, end = last * kChunk < total ? last * kChunk : total;
    int64_t offset = 0;
    for (int64_t k = 0; k < count && offset < end; offset += tensors[k].n, ++k) {
      const int64_t n = tensors[k].n;
      const int64_t from = begin > offset ? begin - offset : 0, to = end - offset < n ? end - offset : n;
      if (from < to) step_range<Op, scalar_t, state_t>(tensors[k], from, to, inverse_scale);
    }
  });
}

template <class scalar_t>
double squares(const scalar_t* g, int64_t n) {
  using L = Lanes<scalar_t>;
  using V = typename L::V;
  constexpr int64_t kRun = 2048;  // elements that are added up in lanes
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    V sum[2] = {V(0), V(0)};
    int next = 0;
    groups<L::size>(begin, begin + kRun < n ? begin + kRun : n, [&](int64_t i, auto count) {
      V v[L::count];
      L::load(g + i, count, v);
      if (count < L::size) L::keep(count, 0, v);
      for (int k = 0; k < L::count; ++k, next ^= 1) sum[next] = sum[next] + v[k] * v[k];
    });
    typename L::real lane[V::size()];
    (sum[0] + sum[1]).store(lane);
    for (int k = 0; k < V::size(); ++k) total += static_cast<double>(lane[k]);
  }
  return total;
}

Error sum_squares(const StepArgs& a, double* sum) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    struct Piece {
      const scalar_t* g;
      int64_t n;
      double sum;
    };
    int64_t count = 0, total = 0;
    for (int64_t k = 0; k < a.count; ++k) count += (a.tensors[k].n + kChunk - 1) / kChunk, total += a.tensors[k].n;
    if (count == 0) return nullptr;
    // Of at most kChunk elements; where it is cut depends on the sizes alone.
    auto* const pieces = static_cast<Piece*>(std::malloc(static_cast<size_t>(count) * sizeof(Piece)));
    if (!pieces) return "not enough memory";
    Piece* piece = pieces;
    for (int64_t k = 0; k < a.count; ++k)
      for (int64_t at = 0; at < a.tensors[k].n; at += kChunk)
        *piece++ = {static_cast<const scalar_t*>(a.tensors[k].g) + at,
                    a.tensors[k].n - at < kChunk ? a.tensors[k].n - at : kChunk, 0};
    const int64_t mean = total / count < 1 ? 1 : total / count;
    cpu::parallel(count, kGrain / mean < 1 ? 1 : kGrain / mean, [all = pieces](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) all[k].sum = squares(all[k].g, all[k].n);
    });
    for (int64_t k = 0; k < count; ++k) *sum += pieces[k].sum;
    std::free(pieces);
    return nullptr;
  });
}

template <class Op>
struct MakeStep {
  static Error step(const StepArgs& a) {
    if (a.found_inf && *a.found_inf != 0.0f) return nullptr;
    return dispatch(a.dtype, [&](auto zero) -> Error {
      using scalar_t = decltype(zero);
      using real = typename Lanes<scalar_t>::real;
      if (a.state_dtype == a.dtype) {
        step_all<Op, scalar_t, scalar_t>(a);
        return nullptr;
      }
      if constexpr (Lanes<scalar_t>::reduced) {
        if (a.state_dtype == c10::ScalarType::Float) {
          step_all<Op, scalar_t, real>(a);
          return nullptr;
        }
      }
      return "unsupported dtype of the optimizer state";
    });
  }
  static void derive(const double* options, double step, bool first, double* numbers) {
    const auto derived = Op::derive(options, step, first);
    static_assert(sizeof derived == Op::numbers * sizeof(double));
    memcpy(numbers, &derived, sizeof derived);
  }
  static constexpr StepRow row{Op::name,    Op::states,      Op::numbers, &step,
                               Op::options, Op::state_names, Op::counts,  &derive};
};
using StepTable = Table<StepRow, MakeStep, Optimizers>;

}  // namespace

extern constinit const SumOfSquares sum_of_squares = &sum_squares;
extern constinit const Rows<StepRow> step_rows{StepTable::rows, std::size(StepTable::rows)};

}  // namespace fastops::CPU_CAPABILITY
