// The optimizer step over a list of tensors: all of them are cut into chunks, and one launch runs over the chunks, its
// table of pointers among the kernel's parameters, so that nothing is copied or allocated and a graph can capture it.
#include <cstring>

#include "../formulas/optimizers.h"
#include "launch.cuh"
#include "pack.cuh"

namespace fastops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;  // elements of one tensor that a block works on
constexpr int kGroups = 8;        // different sets of numbers in one launch

#if defined(FASTOPS_EMULATION) || CUDART_VERSION >= 12010
constexpr size_t kParameterBytes = 32764;  // sm_70 and newer, since CUDA 12.1
#else
constexpr size_t kParameterBytes = 4096;
#endif

// ------------------------------------------------------------------------------------------------ kernels

// As many tensors as fit among the parameters. Block b works on the tensor t with first[t] <= b < first[t + 1].
template <class Op, class real, class scalar_t, class state_t>
struct Batch {
  struct Numbers {
    typename Op::template Numbers<real> of_op;
    real weight;  // of the new value in the average
  };
  static constexpr size_t per_tensor = (3 + state_slots<Op>) * sizeof(void*) + sizeof(int64_t) + sizeof(int) + 1;
  static constexpr size_t rest = kGroups * sizeof(Numbers) + 3 * sizeof(void*) + 64;
  static constexpr int capacity = static_cast<int>((kParameterBytes - rest) / per_tensor);

  scalar_t* p[capacity];
  const scalar_t* g[capacity];
  state_t* s[state_slots<Op>][capacity];
  real* average[capacity];
  int64_t n[capacity];
  const float *grad_scale, *found_inf;
  Numbers numbers[kGroups];
  int first[capacity + 1];
  int count;
  unsigned char group[capacity];
};

template <class Op, class real, class scalar_t, class state_t>
__global__ void __launch_bounds__(kThreads, kResident)
    step_kernel(const Batch<Op, real, scalar_t, state_t> __grid_constant__ batch) {
  constexpr int states = Op::states, slots = state_slots<Op>;
  constexpr int size = pack_size<scalar_t> > pack_size<state_t> ? pack_size<scalar_t> : pack_size<state_t>;
  if (batch.found_inf && load(batch.found_inf) != 0.0f) return;
  real scale = 1;
  if (batch.grad_scale) scale = real(1) / static_cast<real>(load(batch.grad_scale));

  const int block = static_cast<int>(blockIdx.x);
  int tensor = 0;
  for (int above = batch.count; above - tensor > 1;) {
    const int middle = (tensor + above) / 2;
    (batch.first[middle] <= block ? tensor : above) = middle;
  }
  const auto& numbers = batch.numbers[batch.group[tensor]];
  const int64_t begin = (block - batch.first[tensor]) * kChunk;
  const int64_t left = batch.n[tensor] - begin;
  scalar_t* p = batch.p[tensor] + begin;
  const scalar_t* g = batch.g[tensor] + begin;
  state_t* s[slots];
#pragma unroll
  for (int j = 0; j < states; ++j) s[j] = batch.s[j][tensor] + begin;

  real* const average = batch.average[tensor] ? batch.average[tensor] + begin : nullptr;

  Cut whole = cut(left < kChunk ? left : kChunk, size, p, g);
  if (average && !aligned(average + whole.head)) whole = {whole.n, whole.n, 0};
#pragma unroll
  for (int j = 0; j < states; ++j)
    if (!aligned(s[j] + whole.head)) whole = {whole.n, whole.n, 0};

  walk<size>(
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
          Op::step(numbers.of_op, vp[k], vg[k] * scale, state);
#pragma unroll
          for (int j = 0; j < states; ++j) vs[j][k] = state[j];
        }
        store_wide(p + i, vp);
#pragma unroll
        for (int j = 0; j < states; ++j) store_wide(s[j] + i, vs[j]);
        if (average) {
          load_wide(average + i, vg);
#pragma unroll
          for (int k = 0; k < size; ++k) vg[k] = lerp(vg[k], vp[k], numbers.weight);
          store_wide(average + i, vg);
        }
      },
      [&](int64_t i) {
        real vp = static_cast<real>(load(p + i)), state[slots];
#pragma unroll
        for (int j = 0; j < states; ++j) state[j] = static_cast<real>(load(s[j] + i));
        Op::step(numbers.of_op, vp, static_cast<real>(load(g + i)) * scale, state);
        store(p + i, static_cast<scalar_t>(vp));
#pragma unroll
        for (int j = 0; j < states; ++j) store(s[j] + i, static_cast<state_t>(state[j]));
        if (average) store(average + i, lerp(load(average + i), vp, numbers.weight));
      });
}

// ------------------------------------------------------------------------------------------------ launchers

// The group that holds these numbers, added if there is room; else kGroups.
template <class Numbers, class real, int numbers>
int group_of(Numbers (&groups)[kGroups], int& used, const double* values, double weight) {
  real as_real[numbers + 1];
  static_assert(sizeof as_real == sizeof(Numbers));
  for (int k = 0; k < numbers; ++k) as_real[k] = static_cast<real>(values[k]);
  as_real[numbers] = static_cast<real>(weight);
  int group = 0;
  while (group < used && memcmp(&groups[group], as_real, sizeof as_real) != 0) ++group;
  if (group == used && used < kGroups) memcpy(&groups[used++], as_real, sizeof as_real);
  return group;
}

template <class Op, class scalar_t, class state_t>
Error step_all(const StepArgs& a) {
  using real = real_of<scalar_t>;
  using B = Batch<Op, real, scalar_t, state_t>;
  static_assert(sizeof(B) <= kParameterBytes);
  B batch;
  batch.grad_scale = a.grad_scale;
  batch.found_inf = a.found_inf;
  for (int64_t next = 0; next < a.count;) {
    int used = 0;
    int64_t blocks = 0;
    batch.count = 0;
    for (; next < a.count && batch.count < B::capacity; ++next) {
      const StepTensor& t = a.tensors[next];
      if (t.n == 0) continue;
      const int64_t chunks = (t.n + kChunk - 1) / kChunk;
      if (batch.count > 0 && blocks + chunks > INT32_MAX) break;
      const int group = group_of<typename B::Numbers, real, Op::numbers>(batch.numbers, used, t.numbers, t.weight);
      if (group == kGroups) break;
      const int k = batch.count++;
      batch.p[k] = static_cast<scalar_t*>(t.p);
      batch.g[k] = static_cast<const scalar_t*>(t.g);
      for (int j = 0; j < Op::states; ++j) batch.s[j][k] = static_cast<state_t*>(t.s[j]);
      batch.average[k] = static_cast<real*>(t.average);
      batch.n[k] = t.n;
      batch.group[k] = static_cast<unsigned char>(group);
      batch.first[k] = static_cast<int>(blocks);
      blocks += chunks;
    }
    batch.first[batch.count] = static_cast<int>(blocks);
    if (batch.count == 0) continue;
    const Error error = launch(step_kernel<Op, real, scalar_t, state_t>, blocks, kThreads, a.stream, batch);
    if (error) return error;
  }
  return nullptr;
}

template <class Op>
Error step(const StepArgs& a) {
  return dispatch(a.dtype, [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    if (a.state_dtype == a.dtype) return step_all<Op, scalar_t, scalar_t>(a);
    if constexpr (sizeof(scalar_t) == 2)
      if (a.state_dtype == c10::ScalarType::Float) return step_all<Op, scalar_t, float>(a);
    return "unsupported dtype of the optimizer state";
  });
}

// ------------------------------------------------------------------------------------------------ table

template <class Op>
void derive(const double* options, double step, bool first, double* numbers) {
  const auto derived = Op::derive(options, step, first);
  static_assert(sizeof derived == Op::numbers * sizeof(double));
  memcpy(numbers, &derived, sizeof derived);
}

template <class Op>
struct MakeStep {
  static constexpr StepRow row{Op::name,    Op::states,      Op::numbers, &step<Op>,
                               Op::options, Op::state_names, Op::counts,  &derive<Op>};
};
using StepTable = Table<StepRow, MakeStep, Optimizers>;

}  // namespace

extern constinit const SumOfSquares sum_of_squares = nullptr;
extern constinit const Rows<StepRow> step_rows{StepTable::rows, std::size(StepTable::rows)};

}  // namespace fastops::cuda
