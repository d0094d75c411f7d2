// The elementwise loop: any number of tensors in, dense or broadcast, any number out, and a formula
// between them. Alignment, tails, where a broadcast tensor is read and how many packs are in flight
// are decided here, once. No formula.
#pragma once
#include <array>

#include "../math.h"
#include "launch.cuh"
#include "pack.cuh"

namespace fastops::cuda {

constexpr int kElementwiseThreads = 256;

// A formula F has
//   inputs, outputs, params   how many tensors it takes and makes, and how many parameters
//   broadcast                 optional: a bit for each input that may be broadcast
//   apply(x..., p...)         of one element; with several outputs it returns an array `v` of them
// or, where an element's index or a value in device memory matters,
//   Functor<real>             called with (first index, x[inputs][n], y[outputs][n]); prepared(),
//                             where there is one, makes what is called instead, once a thread;
//                             idle() of that says that there is nothing to do
//   strided                   optional, true: the tensors are rows that may be apart, see
//   RowStrides group<scalar_t>           optional: elements of a call, a multiple of a pack's; the
//   first index
//                             of the call is then a multiple as well, or n is 1

// A tensor that is read: beside element i stands its element i / repeat % period. The defaults are
// those of a dense one. A null pointer stands for ones.
template <class scalar_t>
struct Operand {
  const scalar_t* p = nullptr;
  int64_t period = 0, repeat = 1;
};

template <class F>
constexpr unsigned broadcast_of() {
  if constexpr (requires { F::broadcast; }) return F::broadcast;
  return 0;
}
template <class F, int j>
constexpr bool may_broadcast = (broadcast_of<F>() >> j & 1) != 0;

// Tensors of rows of `inner` elements: how far it is from the beginning of a row to that of the
// next in each of them.
template <class F>
struct RowStrides {
  int64_t inner = 0;
  std::array<int64_t, F::outputs> out{};
  std::array<int64_t, F::inputs> in{};
};
template <class F>
constexpr bool is_strided() {
  if constexpr (requires { F::strided; }) return F::strided;
  return false;
}

template <class F, class scalar_t>
constexpr int group_of() {
  if constexpr (requires { F::template group<scalar_t>; }) return F::template group<scalar_t>;
  return pack_size<scalar_t>;
}

// ------------------------------------------------------------------------------------------------
// broadcast operands

// Where an operand is read: the element, and how many of its repeats are behind. Moved along by
// additions: a division is some hundred instructions.
struct Place {
  int64_t at = 0, within = 0;
};

template <class scalar_t>
struct Broadcast {
  enum Access : int {
    kUniform,  // one value for all
    kPacks,    // whole packs
    kSplat,    // one value for a pack
    kSingles   // one by one
  };
  const scalar_t* p;
  int64_t period, repeat;
  Access access;
  Place pack_step, single_step;  // from one pack, or single element, of a thread to its next

  __host__ __device__ __forceinline__ Place place(int64_t i) const {
    const int64_t run = repeat == 1 ? i : quotient(i, repeat);
    return {run - quotient(run, period) * period, i - run * repeat};
  }
  __device__ __forceinline__ void move(Place& place, const Place& by) const {
    place.at += by.at;
    place.within += by.within;
    if (place.within >= repeat) {
      place.within -= repeat;
      ++place.at;
    }
    if (place.at >= period) place.at -= period;
  }
};

// What a thread keeps of a broadcast operand.
template <class scalar_t>
struct BroadcastState {
  Place place;
  scalar_t uniform{};
};

// ------------------------------------------------------------------------------------------------
// kernel

// A formula that is all values.
template <class F, class real>
struct Pointwise {
  Params<F::params, real> params;

  template <int n>
  __device__ __forceinline__ void operator()(int64_t, const real (&x)[F::inputs][n],
                                             real (&y)[F::outputs][n]) const {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const auto value = of(x, k, std::make_index_sequence<F::inputs>{});
      if constexpr (F::outputs == 1) {
        y[0][k] = value;
      } else {
#pragma unroll
        for (int m = 0; m < F::outputs; ++m) y[m][k] = value.v[m];
      }
    }
  }

 private:
  template <int n, size_t... j>
  __device__ __forceinline__ auto of(const real (&x)[F::inputs][n], int k,
                                     std::index_sequence<j...>) const {
    return apply<F>(params, x[j][k]...);
  }
};

template <class F, class real>
struct FunctorOf {
  using type = Pointwise<F, real>;
};
template <class F, class real>
  requires requires { typename F::template Functor<real>; }
struct FunctorOf<F, real> {
  using type = typename F::template Functor<real>;
};
template <class F, class real>
using Functor = typename FunctorOf<F, real>::type;

template <class F, class scalar_t>
struct ElementwiseCall {
  AlignedSpan span;
  scalar_t* out[F::outputs];
  const scalar_t* in[F::inputs];
  Broadcast<scalar_t> broadcast[broadcast_of<F>() ? F::inputs : 1];
  Broadcast<scalar_t> rows;  // strided: whose place is the row that an element is in
  RowStrides<F> gaps;        // strided: from the end of a row to the next
  Functor<F, real_of<scalar_t>> functor;
};

template <class Functor>
__device__ __forceinline__ auto prepared(const Functor& functor) {
  if constexpr (requires { functor.prepared(); }) {
    return functor.prepared();
  } else {
    return functor;
  }
}

// Puts the broadcast inputs at element i.
template <class F, class scalar_t>
__device__ __forceinline__ void start_broadcast(
    [[maybe_unused]] const ElementwiseCall<F, scalar_t>& call,
    [[maybe_unused]] BroadcastState<scalar_t> (&state)[F::inputs], [[maybe_unused]] int64_t i) {
  if constexpr (broadcast_of<F>() != 0) {
#pragma unroll
    for (int j = 0; j < F::inputs; ++j) {
      if (!(broadcast_of<F>() >> j & 1)) continue;
      const Broadcast<scalar_t>& operand = call.broadcast[j];
      if (operand.access != Broadcast<scalar_t>::kUniform) {
        state[j].place = operand.place(i);
      } else {
        state[j].uniform =
            operand.p ? load(operand.p) : static_cast<scalar_t>(real_of<scalar_t>(1));
      }
    }
  }
}

template <class scalar_t, class real, int inputs, int n>
__device__ __forceinline__ void convert(const Raw<scalar_t, n> (&raw)[inputs],
                                        real (&x)[inputs][n]) {
#pragma unroll
  for (int j = 0; j < inputs; ++j) raw[j].values(x[j]);
}

// A thread's reader of the inputs: `packs` groups of n elements, or single ones.
template <class F, class scalar_t, int n, int packs>
struct Reader {
  const ElementwiseCall<F, scalar_t>& call;
  BroadcastState<scalar_t> (&state)[F::inputs];
  Raw<scalar_t, n> raw[packs][F::inputs];

  __device__ __forceinline__ Reader(const ElementwiseCall<F, scalar_t>& call,
                                    BroadcastState<scalar_t> (&state)[F::inputs])
      : call(call), state(state) {}

  // Issues the loads of a group, in row `row` where that matters; nothing is converted, so that
  // none waits for another.
  __device__ __forceinline__ void load_group(int m, int64_t i, int64_t row = 0) {
    load_each(m, i, row, std::make_index_sequence<F::inputs>{});
  }

 private:
  template <size_t... j>
  __device__ __forceinline__ void load_each(int m, int64_t i, int64_t row,
                                            std::index_sequence<j...>) {
    (load_one<j>(raw[m][j], i, row), ...);
  }
  template <int j>
  __device__ __forceinline__ void load_one(Raw<scalar_t, n>& to, int64_t i,
                                           [[maybe_unused]] int64_t row) {
    if constexpr (may_broadcast<F, j>) {
      load_broadcast(call.broadcast[j], state[j], to);
    } else if constexpr (is_strided<F>()) {
      to.load_from(call.in[j] + i + row * call.gaps.in[j]);
    } else {
      to.load_from(call.in[j] + i);
    }
  }
  __device__ __forceinline__ void load_broadcast(const Broadcast<scalar_t>& operand,
                                                 BroadcastState<scalar_t>& of,
                                                 Raw<scalar_t, n>& to) const {
    using B = Broadcast<scalar_t>;
    if (operand.access == B::kUniform) {
      fill(to, of.uniform);
      return;
    }
    if (n == 1 || operand.access == B::kSplat) {
      fill(to, load(operand.p + of.place.at));
    } else if (operand.access == B::kPacks) {
      to.load_from(operand.p + of.place.at);
    } else {
      Place place = of.place;
#pragma unroll
      for (int k = 0; k < n; ++k) {
        to[k] = load(operand.p + place.at);
        operand.move(place, {0, 1});
      }
    }
    operand.move(of.place, n == 1 ? operand.single_step : operand.pack_step);
  }
  __device__ __forceinline__ void fill(Raw<scalar_t, n>& to, scalar_t value) const {
#pragma unroll
    for (int k = 0; k < n; ++k) to[k] = value;
  }
};

// Where there is one input and much of it, a thread asks for two packs before it needs the first:
// with more inputs as much is in flight without.
template <class F>
constexpr int kPacksInFlight = F::inputs == 1 ? 2 : 1;

// The first output may be the first input: no __restrict__.
template <class F, class scalar_t>
__global__ void __launch_bounds__(kElementwiseThreads, kResident)
    elementwise_kernel(const ElementwiseCall<F, scalar_t> __grid_constant__ call) {
  using real = real_of<scalar_t>;
  constexpr int inputs = F::inputs, outputs = F::outputs, group = group_of<F, scalar_t>();
  constexpr int packs = kPacksInFlight<F>;
  static_assert(packs == 1 || (broadcast_of<F>() == 0 && !is_strided<F>()));
  const auto formula = prepared(call.functor);
  if constexpr (requires { formula.idle(); })
    if (formula.idle()) return;
  const AlignedSpan span = call.span;
  const int64_t thread = int64_t{blockIdx.x} * kElementwiseThreads + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * kElementwiseThreads;
  BroadcastState<scalar_t> state[inputs];

  [[maybe_unused]] Place row;
  const auto out_at = [&](int o, int64_t i) {
    if constexpr (is_strided<F>()) return call.out[o] + i + row.at * call.gaps.out[o];
    return call.out[o] + i;
  };

  if (thread < span.packs) {
    start_broadcast(call, state, span.head + thread * group);
    if constexpr (is_strided<F>()) row = call.rows.place(span.head + thread * group);
    for (int64_t k = thread; k < span.packs; k += packs * threads) {
      Reader<F, scalar_t, group, packs> reader(call, state);
#pragma unroll
      for (int m = 0; m < packs; ++m)
        if (m == 0 || k + m * threads < span.packs)
          reader.load_group(m, span.head + (k + m * threads) * group, row.at);
#pragma unroll
      for (int m = 0; m < packs; ++m) {
        if (m > 0 && k + m * threads >= span.packs) continue;
        const int64_t i = span.head + (k + m * threads) * group;
        real x[inputs][group], y[outputs][group];
        convert(reader.raw[m], x);
        formula(i, x, y);
#pragma unroll
        for (int o = 0; o < outputs; ++o) store_wide(out_at(o, i), y[o]);
      }
      if constexpr (is_strided<F>()) call.rows.move(row, call.rows.pack_step);
    }
  }

  // What is before the first pack and after the last: less than two packs, or all there is.
  const int64_t packed = span.packs * group;
  if (thread < span.n - packed) {
    const int64_t first = thread < span.head ? thread : thread + packed;
    start_broadcast(call, state, first);
    if constexpr (is_strided<F>()) row = call.rows.place(first);
    for (int64_t k = thread; k < span.n - packed; k += threads) {
      const int64_t i = k < span.head ? k : k + packed;
      Reader<F, scalar_t, 1, 1> reader(call, state);
      reader.load_group(0, i, row.at);
      real x[inputs][1], y[outputs][1];
      convert(reader.raw[0], x);
      formula(i, x, y);
#pragma unroll
      for (int o = 0; o < outputs; ++o) store(out_at(o, i), static_cast<scalar_t>(y[o][0]));
      if constexpr (is_strided<F>()) call.rows.move(row, call.rows.single_step);
    }
  }
}

// ------------------------------------------------------------------------------------------------
// launcher

// What a kernel is told. Without an output, the inputs are read in packs from the first element on,
// or not at all.
template <class F, class scalar_t>
ElementwiseCall<F, scalar_t> elementwise_call(int64_t n,
                                              const std::array<scalar_t*, F::outputs>& out,
                                              const std::array<Operand<scalar_t>, F::inputs>& in,
                                              const Functor<F, real_of<scalar_t>>& functor,
                                              const RowStrides<F>& strides = {}) {
  constexpr int group = group_of<F, scalar_t>();
  constexpr bool anchored = requires { F::template group<scalar_t>; };
  ElementwiseCall<F, scalar_t> call{{}, {}, {}, {}, {}, {}, functor};
  AlignedSpan& span = call.span;
  span = aligned_span(n, group, out[0]);
  for (int o = 0; o < F::outputs; ++o) call.out[o] = out[o];
  for (int j = 0; j < F::inputs; ++j) call.in[j] = in[j].p;
  bool whole = !anchored || span.head == 0;
  for (int o = 1; o < F::outputs; ++o) whole = whole && aligned(out[o] + span.head);
  for (int j = 0; j < F::inputs; ++j)
    whole = whole && (broadcast_of<F>() >> j & 1 || aligned(in[j].p + span.head));
  if constexpr (is_strided<F>()) {
    bool dense = true, packs = span.head == 0 && strides.inner % group == 0;
    const auto look_at = [&](int64_t stride, int64_t& gap) {
      gap = stride - strides.inner;
      dense = dense && gap == 0;
      packs = packs && stride % pack_size<scalar_t> == 0;
    };
    for (int o = 0; o < F::outputs; ++o) look_at(strides.out[o], call.gaps.out[o]);
    for (int j = 0; j < F::inputs; ++j) look_at(strides.in[j], call.gaps.in[j]);
    whole = whole && (dense || packs);
    call.rows.repeat = dense ? std::max<int64_t>(n, 1) : strides.inner;
    call.rows.period = std::max<int64_t>(quotient(n, call.rows.repeat), 1);
  }
  if (!whole) span = {n, n, 0};

  if constexpr (broadcast_of<F>() != 0) {
    using B = Broadcast<scalar_t>;
    for (int j = 0; j < F::inputs; ++j) {
      if (!(broadcast_of<F>() >> j & 1)) continue;
      B& operand = call.broadcast[j];
      operand.p = in[j].p;
      operand.period = in[j].period ? in[j].period : std::max<int64_t>(n, 1);
      operand.repeat = in[j].repeat;
      const bool dense = operand.period == n && operand.repeat == 1;
      const bool packs = operand.repeat == 1 && (dense || operand.period % group == 0);
      if (!operand.p || operand.period == 1) {
        operand.access = B::kUniform;
      } else if ((dense || span.head == 0) && packs && aligned(operand.p + span.head)) {
        operand.access = B::kPacks;
      } else if (span.head == 0 && operand.repeat % group == 0) {
        operand.access = B::kSplat;
      } else {
        operand.access = B::kSingles;
      }
    }
  }
  return call;
}

// Says how far a thread goes from one pack, and from one single element, to its next.
template <class F, class scalar_t>
void set_steps(ElementwiseCall<F, scalar_t>& call, int64_t pack, int64_t single) {
  if constexpr (is_strided<F>()) {
    call.rows.pack_step = call.rows.place(pack);
    call.rows.single_step = call.rows.place(single);
  }
  if constexpr (broadcast_of<F>() != 0)
    for (int j = 0; j < F::inputs; ++j)
      if (broadcast_of<F>() >> j & 1) {
        call.broadcast[j].pack_step = call.broadcast[j].place(pack);
        call.broadcast[j].single_step = call.broadcast[j].place(single);
      }
}

// out[i] = F(in[0][i], ...) for n elements. The first output may be the first input.
template <class F, class scalar_t>
Error launch_elementwise(int64_t n, const std::array<scalar_t*, F::outputs>& out,
                         const std::array<Operand<scalar_t>, F::inputs>& in,
                         const Functor<F, real_of<scalar_t>>& functor, void* stream,
                         const RowStrides<F>& strides = {}) {
  constexpr int group = group_of<F, scalar_t>();
  if (n == 0) return nullptr;
  ElementwiseCall<F, scalar_t> call = elementwise_call<F, scalar_t>(n, out, in, functor, strides);
  const int64_t items = std::max(call.span.packs, n - call.span.packs * group);
  const int64_t blocks = grid_for(items, kElementwiseThreads);
  set_steps(call, blocks * kElementwiseThreads * group, blocks * kElementwiseThreads);
  return launch(elementwise_kernel<F, scalar_t>, blocks, kElementwiseThreads, stream, call);
}

}  // namespace fastops::cuda
