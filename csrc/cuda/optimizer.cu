// The optimizer step over a list of tensors: all of them are cut into chunks, and one launch runs
// over the chunks, its table of pointers among the kernel's parameters, so that nothing is copied
// or allocated and a graph can capture it. Where step counts or options are in device memory, a
// launch of one thread per tensor makes the scalars before.
#include <cstring>

#include "../formulas/optimizers.h"
#include "../formulas/philox.h"
#include "../kernels/optimizer.h"
#include "launch.cuh"
#include "pack.cuh"
#include "tensor_list.cuh"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;  // elements of one tensor that a block works on
constexpr int kGroups = 8;        // different sets of scalars in one launch

// ------------------------------------------------------------------------------------------------
// kernels

// What the tensors of one group are stepped with. Extended kernels, apart so that the others pay
// nothing for it, can also round stochastically and read the scalars from device memory.
template <class Op, class real, bool extended>
struct StepScalars {
  typename Op::template StepScalars<real> of_op;
  real weight;  // of the new value in the average
};
template <class Op, class real>
struct StepScalars<Op, real, true> {
  typename Op::template StepScalars<real> of_op;
  real weight;
  Noise noise;  // without the tensor's number
};

template <class Op, class real, bool extended, int capacity>
struct Extension {};
template <class Op, class real, int capacity>
struct Extension<Op, real, true, capacity> {
  const StepScalars<Op, real, true>* derived;  // one per tensor, or null
  bool rounds;                                 // stochastically
  uint32_t number[capacity];                   // of the tensor, to Noise
};

constexpr int tensors_that_fit(size_t per_tensor, size_t scalars) {
  return static_cast<int>((kParameterBytes - kGroups * scalars - 3 * sizeof(void*) - 96) /
                          per_tensor);
}

// As many tensors as fit among the parameters. Block b works on the tensor t with first[t] <= b <
// first[t + 1].
template <class Op, class real, class scalar_t, class state_t, bool extended,
          int capacity_ = tensors_that_fit((3 + state_slots<Op>)*sizeof(void*) + sizeof(int64_t) +
                                               sizeof(int) + 1 + (extended ? sizeof(uint32_t) : 0),
                                           sizeof(StepScalars<Op, real, extended>))>
struct Batch : Extension<Op, real, extended, capacity_> {
  using N = StepScalars<Op, real, extended>;
  static constexpr int capacity = capacity_;

  scalar_t* p[capacity];
  const scalar_t* g[capacity];
  state_t* s[state_slots<Op>][capacity];
  real* average[capacity];
  int64_t n[capacity];
  const float *grad_scale, *found_inf;
  N scalars[kGroups];
  int first[capacity + 1];
  int count;
  unsigned char group[capacity];

  __device__ __forceinline__ decltype(auto) numbers_of(int tensor) const {
    if constexpr (extended) {
      return this->derived ? load(this->derived + tensor) : scalars[group[tensor]];
    } else {
      return (scalars[group[tensor]]);
    }
  }
};

// Where the elements of one tensor's chunk are stored. Elements are counted within the tensor;
// `begin` is the chunk's.
template <bool rounds>
struct Stores {
  template <class real, class scalar_t, int n>
  __device__ __forceinline__ void wide(scalar_t* p, int64_t i, const real (&v)[n], int) {
    store_wide(p + i, v);
  }
  template <class real, class scalar_t>
  __device__ __forceinline__ void single(scalar_t* p, int64_t i, real v, int) {
    store(p + i, static_cast<scalar_t>(v));
  }
};
template <>
struct Stores<true> {
  Noise noise;
  int64_t begin;
  bool on;
  static __device__ __forceinline__ c10::BFloat16 rounded(float v, uint32_t word, int slot) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return {static_cast<uint16_t>(round_stochastically(bits, word, slot)),
            c10::BFloat16::from_bits()};
  }
  __device__ __forceinline__ Philox<uint32_t> words(int64_t i, int slot) const {
    const int64_t counter = (begin + i) / 4;
    return noise.words(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), slot);
  }
  // begin + i is a multiple of 4.
  template <class real, class scalar_t, int n>
  __device__ __forceinline__ void wide(scalar_t* p, int64_t i, const real (&v)[n], int slot) {
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      static_assert(n % pack_size<scalar_t> == 0);
      if (on) {
        Pack<c10::BFloat16, n> pack;
#pragma unroll
        for (int k = 0; k < n; k += 4) {
          const Philox<uint32_t> philox = words(i + k, slot);
#pragma unroll
          for (int j = 0; j < 4; ++j) pack.v[k + j] = rounded(v[k + j], philox.word[j], slot);
        }
        return store_pack<n>(p + i, pack);
      }
    }
    store_wide(p + i, v);
  }
  template <class real, class scalar_t>
  __device__ __forceinline__ void single(scalar_t* p, int64_t i, real v, int slot) {
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      if (on) {
        const Philox<uint32_t> philox = words(i, slot);
        const int which = static_cast<int>((begin + i) % 4);
        const uint32_t low = which & 1 ? philox.word[1] : philox.word[0];
        const uint32_t high = which & 1 ? philox.word[3] : philox.word[2];
        return store(p + i, rounded(v, which & 2 ? high : low, slot));
      }
    }
    store(p + i, static_cast<scalar_t>(v));
  }
};

template <class Op, class real, class scalar_t, class state_t, bool extended>
__global__ void __launch_bounds__(kThreads, kResident)
    step_kernel(const Batch<Op, real, scalar_t, state_t, extended> __grid_constant__ batch) {
  constexpr int states = Op::states, slots = state_slots<Op>;
  constexpr int size =
      pack_size<scalar_t> > pack_size<state_t> ? pack_size<scalar_t> : pack_size<state_t>;
  if (batch.found_inf && load(batch.found_inf) != 0.0f) return;
  real scale = 1;
  if (batch.grad_scale) scale = real(1) / static_cast<real>(load(batch.grad_scale));

  const int block = static_cast<int>(blockIdx.x);
  const int tensor = tensor_of_block(batch.first, batch.count, block);
  const auto& scalars = batch.numbers_of(tensor);
  const int64_t begin = (block - batch.first[tensor]) * kChunk;
  const int64_t left = batch.n[tensor] - begin;
  scalar_t* p = batch.p[tensor] + begin;
  const scalar_t* g = batch.g[tensor] + begin;
  state_t* s[slots];
#pragma unroll
  for (int j = 0; j < states; ++j) s[j] = batch.s[j][tensor] + begin;

  real* const average = batch.average[tensor] ? batch.average[tensor] + begin : nullptr;

  AlignedSpan whole = aligned_span(left < kChunk ? left : kChunk, size, p, g);
  if (average && !aligned(average + whole.head)) whole = {whole.n, whole.n, 0};
#pragma unroll
  for (int j = 0; j < states; ++j)
    if (!aligned(s[j] + whole.head)) whole = {whole.n, whole.n, 0};

  constexpr bool rounds = extended && (std::is_same_v<scalar_t, c10::BFloat16> ||
                                       std::is_same_v<state_t, c10::BFloat16>);
  Stores<rounds> put;
  if constexpr (rounds) {
    put.noise = scalars.noise;
    put.noise.number = batch.number[tensor];
    put.begin = begin;
    put.on = batch.rounds;
    if (put.on && whole.head % 4 != 0) whole = {whole.n, whole.n, 0};
  }

  for_each_pack<size>(
      whole, threadIdx.x, kThreads,
      [&](int64_t i) {
        real vp[size], vg[size], vs[slots][size];
        load_wide(p + i, vp);
        load_wide(g + i, vg);
#pragma unroll
        for (int j = 0; j < states; ++j) load_wide(s[j] + i, vs[j]);
#pragma unroll
        for (int k = 0; k < size; ++k) {
          real state[slots];
#pragma unroll
          for (int j = 0; j < states; ++j) state[j] = vs[j][k];
          Op::step(scalars.of_op, vp[k], vg[k] * scale, state);
#pragma unroll
          for (int j = 0; j < states; ++j) vs[j][k] = state[j];
        }
        put.wide(p, i, vp, 0);
#pragma unroll
        for (int j = 0; j < states; ++j) put.wide(s[j], i, vs[j], 1 + j);
        if (average) {
          load_wide(average + i, vg);
#pragma unroll
          for (int k = 0; k < size; ++k) vg[k] = lerp(vg[k], vp[k], scalars.weight);
          store_wide(average + i, vg);
        }
      },
      [&](int64_t i) {
        real vp = static_cast<real>(load(p + i)), state[slots];
#pragma unroll
        for (int j = 0; j < states; ++j) state[j] = static_cast<real>(load(s[j] + i));
        Op::step(scalars.of_op, vp, static_cast<real>(load(g + i)) * scale, state);
        put.single(p, i, vp, 0);
#pragma unroll
        for (int j = 0; j < states; ++j) put.single(s[j], i, state[j], 1 + j);
        if (average) store(average + i, lerp(load(average + i), vp, scalars.weight));
      });
}

// The scalars of a batch's tensors, from step counts and options in device memory.
constexpr int kDerived = 1024;
template <class Op>
constexpr int kScalarStates = count_words(Op::scalar_state_names, ' ');
template <class Op, class real>
struct Derivation {
  OptimizerOnDevice from;
  const float* found_inf;
  StepScalars<Op, real, true> given[kGroups];  // what does not depend on the step, per group
  StepScalars<Op, real, true>* made;
  int count;
  void* scalar_states[kScalarStates<Op> > 0 ? kScalarStates<Op> : 1][kDerived];
  bool first[kDerived];
  unsigned char group[kDerived];
};

__device__ __forceinline__ double read(const void* at, bool in_double) {
  if (in_double) return load(static_cast<const double*>(at));
  return static_cast<double>(load(static_cast<const float*>(at)));
}
__device__ __forceinline__ void write(void* at, double value, bool in_double) {
  if (in_double) return store(static_cast<double*>(at), value);
  store(static_cast<float*>(at), static_cast<float>(value));
}

template <class Op, class real>
__global__ void __launch_bounds__(kThreads, kResident)
    derive_kernel(const Derivation<Op, real> __grid_constant__ d) {
  const int tensor = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (tensor >= d.count || (d.found_inf && load(d.found_inf) != 0.0f)) return;
  double options[kMaxOptions], scalar_states[kMaxScalarStates] = {};
#pragma unroll
  for (int k = 0; k < kMaxOptions; ++k)
    options[k] = d.from.option_at[k] ? load(d.from.option_at[k]) : d.from.options[k];
#pragma unroll
  for (int k = 0; k < kScalarStates<Op>; ++k)
    scalar_states[k] = read(d.scalar_states[k][tensor], d.from.in_double >> k & 1);
  if constexpr (kScalarStates<Op> > 0)
    scalar_states[0] = d.from.in_double & 1
                           ? scalar_states[0] + 1
                           : static_cast<double>(static_cast<float>(scalar_states[0]) + 1.0f);
  const auto derived =
      Op::scalars_for_step(options, {scalar_states, d.from.in_double}, d.first[tensor]);
#pragma unroll
  for (int k = 0; k < kScalarStates<Op>; ++k)
    write(d.scalar_states[k][tensor], scalar_states[k], d.from.in_double >> k & 1);
  StepScalars<Op, real, true> made = d.given[d.group[tensor]];
#pragma unroll
  for (int k = 0; k < scalars_of<Op>; ++k)
    reinterpret_cast<real*>(&made.of_op)[k] =
        static_cast<real>(reinterpret_cast<const double*>(&derived)[k]);
  if constexpr (kScalarStates<Op> > 0) made.noise.step = static_cast<uint32_t>(scalar_states[0]);
  store(d.made + tensor, made);
}

// ------------------------------------------------------------------------------------------------
// launchers

template <class Op, class real, bool extended>
void fill(StepScalars<Op, real, extended>& made, const OptimizerTensor& t,
          const OptimizerNoise* noise) {
  memset(&made, 0, sizeof made);  // the padding too: they are compared as bytes
  for (int k = 0; k < scalars_of<Op>; ++k)
    if (t.scalars) reinterpret_cast<real*>(&made.of_op)[k] = static_cast<real>(t.scalars[k]);
  made.weight = static_cast<real>(t.weight);
  if constexpr (extended)
    if (noise)
      made.noise = {static_cast<uint32_t>(noise->seed), static_cast<uint32_t>(noise->seed >> 32),
                    noise->step, 0};
}

// The group that holds these scalars, added if there is room; else kGroups.
template <class N>
int group_of(N (&groups)[kGroups], int& used, const N& scalars) {
  int group = 0;
  while (group < used && memcmp(&groups[group], &scalars, sizeof scalars) != 0) ++group;
  if (group == used && used < kGroups) memcpy(&groups[used++], &scalars, sizeof scalars);
  return group;
}

// Starts the derivation of the scalars of the batch, whose first tensor is `begin`. What they hold
// that no step count makes, the weight of an average and the key of the noise, is the group's.
template <class Op, class real, class B>
Error derive_all(const OptimizerArgs& a, const B& batch, int64_t begin,
                 StepScalars<Op, real, true>* made) {
  static_assert(sizeof(*made) <= kScalarsBytes);
  Derivation<Op, real> d;
  d.from = *a.on_device;
  d.found_inf = a.found_inf;
  d.made = made;
  d.count = batch.count;
  memcpy(d.given, batch.scalars, sizeof d.given);
  memcpy(d.group, batch.group, static_cast<size_t>(batch.count));
  for (int k = 0; k < d.count; ++k) {
    const int64_t tensor = begin + k;
    for (int j = 0; j < kScalarStates<Op>; ++j)
      d.scalar_states[j][k] = a.on_device->scalar_states[j][tensor];
    d.first[k] = a.on_device->first[tensor];
  }
  return launch(derive_kernel<Op, real>, (d.count + kThreads - 1) / kThreads, kThreads, a.stream,
                d);
}

template <class Op, class scalar_t, class state_t, bool extended>
Error step_all(const OptimizerArgs& a) {
  using real = real_of<scalar_t>;
  using B = Batch<Op, real, scalar_t, state_t, extended>;
  static_assert(sizeof(B) <= kParameterBytes && B::capacity <= kDerived);
  B batch;
  batch.grad_scale = a.grad_scale;
  batch.found_inf = a.found_inf;
  for (int64_t next = 0; next < a.count;) {
    const int64_t begin = next;
    int used = 0;
    int64_t blocks = 0;
    batch.count = 0;
    for (; next < a.count && batch.count < B::capacity; ++next) {
      const OptimizerTensor& t = a.tensors[next];
      if (t.n == 0 && !a.on_device) continue;
      const int64_t chunks = (t.n + kChunk - 1) / kChunk;
      if (batch.count > 0 && blocks + chunks > INT32_MAX) break;
      const OptimizerNoise* noise = a.noise ? a.noise + next : nullptr;
      typename B::N scalars;
      fill(scalars, t, noise);
      const int group = group_of(batch.scalars, used, scalars);
      if (group == kGroups) break;
      const int k = batch.count++;
      batch.p[k] = static_cast<scalar_t*>(t.p);
      batch.g[k] = static_cast<const scalar_t*>(t.g);
      for (int j = 0; j < Op::states; ++j) batch.s[j][k] = static_cast<state_t*>(t.s[j]);
      batch.average[k] = static_cast<real*>(t.average);
      batch.n[k] = t.n;
      batch.group[k] = static_cast<unsigned char>(group);
      batch.first[k] = static_cast<int>(blocks);
      if constexpr (extended) batch.number[k] = noise ? noise->number : 0;
      blocks += chunks;
    }
    batch.first[batch.count] = static_cast<int>(blocks);
    if (batch.count == 0) continue;
    if constexpr (extended) {
      batch.rounds = a.noise != nullptr;
      batch.derived = nullptr;
      if (a.on_device) {
        auto* made = static_cast<typename B::N*>(a.on_device->scalars) + begin;
        batch.derived = made;
        const Error error = derive_all<Op, real>(a, batch, begin, made);
        if (error) return error;
      }
    }
    if (blocks == 0) continue;
    const Error error = launch(step_kernel<Op, real, scalar_t, state_t, extended>, blocks, kThreads,
                               a.stream, batch);
    if (error) return error;
  }
  return nullptr;
}

template <class Op>
Error step(const OptimizerArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    const auto run = [&](auto state) -> Error {
      using state_t = decltype(state);
      if (a.noise || a.on_device) return step_all<Op, scalar_t, state_t, true>(a);
      return step_all<Op, scalar_t, state_t, false>(a);
    };
    if (a.state_dtype == a.dtype || Op::states == 0) return run(scalar_t{});
    if constexpr (sizeof(scalar_t) == 2 && Op::states > 0)
      if (a.state_dtype == c10::ScalarType::Float) return run(float{});
    if constexpr (std::is_same_v<scalar_t, float> && Op::states > 0)
      if (a.state_dtype == c10::ScalarType::BFloat16) return run(c10::BFloat16{});
    return "unsupported dtype of the optimizer state";
  });
}

// ------------------------------------------------------------------------------------------------
// table

template <class Op>
void scalars_for_step(const double* options, bool first, double* scalar_states, unsigned in_double,
                      double* scalars) {
  write_scalars<Op>(options, first, scalar_states, in_double, scalars);
}
template <class Op>
struct MakeOptimizer {
  static constexpr OptimizerKernel kernel = optimizer_kernel<Op>(&step<Op>, &scalars_for_step<Op>);
};
using OptimizerTable = Table<OptimizerKernel, MakeOptimizer, Optimizers>;

}  // namespace

extern constinit const KernelTable<OptimizerKernel> optimizer_kernels{
    OptimizerTable::kernels, std::size(OptimizerTable::kernels)};

}  // namespace fastops::cuda
