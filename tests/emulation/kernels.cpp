// The tables of csrc/cuda for ctypes: what rows there are, a function per kind that runs one, the
// emulator's memory, orders and counters, and each optimizer's formula applied element by element
// as a reference.
#include "../../csrc/kernels/tables.h"

#include <cuda_runtime.h>

#include <cstring>
#include <deque>
#include <vector>

#include "../../csrc/cuda/elementwise.cuh"
#include "../../csrc/formulas/activations.h"
#include "../../csrc/formulas/optimizers.h"

namespace fastops {
namespace {

const Tables& tables() {
  static const Tables tables = cuda::tables();
  return tables;
}

// ------------------------------------------------------------------------------------------------
// formulas

template <class Op, class real>
void step_elements(const double* values, int64_t n, real* p, const real* g, real* const* s) {
  typename Op::template StepScalars<real> scalars;
  for (int k = 0; k < scalars_of<Op>; ++k)
    reinterpret_cast<real*>(&scalars)[k] = static_cast<real>(values[k]);
  for (int64_t i = 0; i < n; ++i) {
    real state[state_slots<Op>];
    for (int j = 0; j < Op::states; ++j) state[j] = s[j][i];
    Op::step(scalars, p[i], g[i], state);
    for (int j = 0; j < Op::states; ++j) s[j][i] = state[j];
  }
}
template <class real, class... Ops>
bool step_formula(List<Ops...>, const char* name, const double* scalars, int64_t n, real* p,
                  const real* g, real* const* s) {
  return ((!std::strcmp(Ops::name, name) && (step_elements<Ops>(scalars, n, p, g, s), true)) ||
          ...);
}

template <class Op, size_t... I>
void second_elements(const double* params, int64_t n, const float* s, const float* dy,
                     const float* ddx, float* out, std::index_sequence<I...>) {
  using D = Dual<float>;
  for (int64_t i = 0; i < n; ++i)
    out[i] =
        Op::backward(D(s[i], 1.0f), D(dy[i], 0.0f), D(static_cast<float>(params[I]), 0.0f)...).d *
        ddx[i];
}
template <class... Ops>
bool second_formula(List<Ops...>, const char* name, const double* params, int64_t n, const float* s,
                    const float* dy, const float* ddx, float* out) {
  return ((!std::strcmp(Ops::name, name) &&
           (second_elements<Ops>(params, n, s, dy, ddx, out,
                                 std::make_index_sequence<count_params(Ops::params)>{}),
            true)) ||
          ...);
}

// Two outputs, and an input that is broadcast: what the elementwise loop can do beyond what the
// tables ask of it.
struct Probe {
  static constexpr int inputs = 2, outputs = 2, params = 0;
  static constexpr unsigned broadcast = 0b10;
  template <class T>
  static cuda::Pack<T, 2> apply(T x, T w) {
    return {x * w, x + w};
  }
};

}  // namespace
}  // namespace fastops

// ------------------------------------------------------------------------------------------------
// C

using namespace fastops;

extern "C" {

// Row `index` of a table; null past the end.
const char* elementwise_name(size_t index) {
  return index < tables().elementwise.size ? tables().elementwise.data[index].name : nullptr;
}
const char* elementwise_params(size_t index) { return tables().elementwise.data[index].params; }
bool elementwise_from_output(size_t index) { return tables().elementwise.data[index].from_output; }
const char* loss_name(size_t index) {
  return index < tables().loss.size ? tables().loss.data[index].name : nullptr;
}
const char* loss_params(size_t index) { return tables().loss.data[index].params; }
const char* fused_name(size_t index) {
  return index < tables().fused.size ? tables().fused.data[index].name : nullptr;
}
bool fused_broadcast(size_t index) { return tables().fused.data[index].broadcast; }
const char* softmax_name(size_t index) {
  return index < tables().softmax.size ? tables().softmax.data[index].name : nullptr;
}
const char* cross_entropy_name(size_t index) {
  return index < tables().cross_entropy.size ? tables().cross_entropy.data[index].name : nullptr;
}
const char* dropout_name(size_t index) {
  return index < tables().dropout.size ? tables().dropout.data[index].name : nullptr;
}
int dropout_inputs(size_t index) { return tables().dropout.data[index].inputs; }
const char* optimizer_name(size_t index) {
  return index < tables().optimizer.size ? tables().optimizer.data[index].name : nullptr;
}
int optimizer_states(size_t index) { return tables().optimizer.data[index].states; }
int optimizer_numbers(size_t index) { return tables().optimizer.data[index].scalars; }

const char* run_elementwise(size_t index, const char* which, int dtype, int64_t n, void* out,
                            const void* const* in, const double* params) {
  const ElementwiseKernel& row = tables().elementwise.data[index];
  ElementwiseArgs a{};
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.n = n;
  a.out = out;
  for (int k = 0; k < 3; ++k) a.in[k] = in[k];
  a.params = params;
  return (!std::strcmp(which, "forward")    ? row.forward
          : !std::strcmp(which, "backward") ? row.backward
                                            : row.second)(a);
}

const char* run_probe(int dtype, int64_t n, void* product, void* sum, const void* x, const void* w,
                      int64_t period, int64_t repeat) {
  return cuda::dispatch(static_cast<c10::ScalarType>(dtype), [&](auto zero) -> Error {
    using scalar_t = decltype(zero);
    using real = cuda::real_of<scalar_t>;
    const std::array<cuda::Operand<scalar_t>, 2> in{
        {{static_cast<const scalar_t*>(x), 0, 1},
         {static_cast<const scalar_t*>(w), period, repeat}}};
    return cuda::launch_elementwise<Probe, scalar_t>(
        n, {static_cast<scalar_t*>(product), static_cast<scalar_t*>(sum)}, in,
        {cuda::Params<0, real>(nullptr)}, nullptr);
  });
}

bool second_in_float(const char* name, const double* params, int64_t n, const float* s,
                     const float* dy, const float* ddx, float* out) {
  return second_formula(Activations{}, name, params, n, s, dy, ddx, out);
}

const char* run_loss(size_t index, const char* which, int dtype, int64_t n, void* out,
                     const void* x, const void* t, const void* grad, bool grad_is_scalar,
                     double scale, const void* divisor, const double* params, void* workspace,
                     const void* w, int64_t period) {
  const LossKernel& row = tables().loss.data[index];
  LossArgs a{};
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.n = n;
  a.out = out;
  a.in[0] = x;
  a.in[1] = t;
  a.in[2] = w;
  a.period = period;
  a.grad = grad;
  a.grad_is_scalar = grad_is_scalar;
  a.scale = scale;
  a.divisor = divisor;
  a.params = params;
  a.workspace = workspace;
  const struct {
    const char* name;
    LossLauncher kernel;
    int to_target = 0;
  } kernels[] = {{"values", row.values}, {"total", row.total},   {"d0", row.d0},
                 {"d1", row.d1},         {"d00", row.second, 0}, {"d01", row.second, 1},
                 {"d11", row.second, 2}};
  for (const auto& [name, kernel, to_target] : kernels) {
    a.to_target = to_target;
    if (!std::strcmp(name, which)) return kernel(a);
  }
  return "no such kernel";
}
int64_t workspace_bytes(int64_t n) { return loss_workspace(n); }

const char* run_fused(size_t index, bool backward, int dtype, int64_t n, int64_t period, void* out,
                      const void* const* in) {
  const FusedKernel& row = tables().fused.data[index];
  FusedArgs a{
      static_cast<c10::ScalarType>(dtype), n, period, out, {in[0], in[1], in[2]}, nullptr, nullptr};
  return (backward ? row.backward : row.forward)(a);
}

const char* run_fused_summed(size_t index, int dtype, int64_t n, int64_t period, void* out,
                             const void* const* in, void* sums) {
  FusedArgs a{
      static_cast<c10::ScalarType>(dtype), n, period, out, {in[0], in[1], in[2]}, sums, nullptr};
  return tables().fused.data[index].summed(a);
}

const char* gate_name(size_t index) {
  return index < tables().gate.size ? tables().gate.data[index].name : nullptr;
}
// data, stride: of two outputs and five inputs.
const char* run_gate(size_t index, const char* which, int dtype, int64_t outer, int64_t inner,
                     void* const* data, const int64_t* stride) {
  const GateKernel& row = tables().gate.data[index];
  GateArgs a{};
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.outer = outer;
  a.inner = inner;
  for (int o = 0; o < 2; ++o) a.out[o] = {data[o], stride[o]};
  for (int j = 0; j < 5; ++j) a.in[j] = {data[2 + j], stride[2 + j]};
  return (!std::strcmp(which, "forward")    ? row.forward
          : !std::strcmp(which, "backward") ? row.backward
          : !std::strcmp(which, "tangent")  ? row.tangent
                                            : row.second)(a);
}

const char* run_softmax(size_t index, bool backward, int dtype, int64_t outer, int64_t n,
                        int64_t inner, void* out, const void* first, const void* second) {
  const SoftmaxKernel& row = tables().softmax.data[index];
  SoftmaxArgs a{};
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.outer = outer;
  a.n = n;
  a.inner = inner;
  a.out = out;
  a.in[0] = first;
  a.in[1] = second;
  return (backward ? row.backward : row.forward)(a);
}

const char* run_cross_entropy(size_t index, int dtype, int64_t outer, int64_t n, int64_t inner,
                              const void* x, const int64_t* target, const void* weight,
                              int64_t ignore_index, double label_smoothing, void* loss, void* grad,
                              double scale, const void* divisor, void* divisor_out, double z_loss,
                              void* lse, const int64_t* second_target, double lam,
                              const void* second_divisor) {
  const CrossEntropyKernel& row = tables().cross_entropy.data[index];
  CrossEntropyArgs a{};
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.outer = outer;
  a.n = n;
  a.inner = inner;
  a.x = x;
  a.target = target;
  a.weight = weight;
  a.ignore_index = ignore_index;
  a.label_smoothing = label_smoothing;
  a.loss = loss;
  a.grad = grad;
  a.scale = scale;
  a.divisor = divisor;
  a.z_loss = z_loss;
  a.lse = lse;
  a.second_target = second_target;
  a.lam = lam;
  a.second_divisor = second_divisor;
  if (divisor_out) {
    int64_t bad_row = 0;
    if (const Error error = row.divisor(a, divisor_out, &bad_row)) return error;
    if (bad_row != -1) return "a bad row was found on the host";
    if (!loss) return nullptr;
  }
  return row.forward(a);
}

const char* run_divisor(size_t index, int dtype, int64_t outer, int64_t n, int64_t inner,
                        const int64_t* target, const void* weight, int64_t ignore_index, void* loss,
                        void* out) {
  CrossEntropyArgs a{};
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.outer = outer;
  a.n = n;
  a.inner = inner;
  a.target = target;
  a.weight = weight;
  a.ignore_index = ignore_index;
  a.loss = loss;
  int64_t bad_row = 0;
  return tables().cross_entropy.data[index].divisor(a, out, &bad_row);
}

const char* run_rescale(size_t index, int dtype, int64_t n, void* grad, const void* factor,
                        bool factor_is_real) {
  const RescaleArgs a{
      static_cast<c10::ScalarType>(dtype), n, grad, factor, factor_is_real, nullptr};
  return tables().cross_entropy.data[index].rescale(a);
}

const char* run_cross_entropy_probability(size_t index, int dtype, int64_t outer, int64_t n,
                                          int64_t inner, const void* x, const void* probability,
                                          const void* weight, double label_smoothing, void* loss,
                                          void* grad, double scale, double z_loss, void* lse) {
  CrossEntropyArgs a{};
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.outer = outer;
  a.n = n;
  a.inner = inner;
  a.x = x;
  a.probability = probability;
  a.weight = weight;
  a.label_smoothing = label_smoothing;
  a.loss = loss;
  a.grad = grad;
  a.scale = scale;
  a.z_loss = z_loss;
  a.lse = lse;
  return tables().cross_entropy.data[index].forward_probability(a);
}

const char* run_dropout_backward(size_t index, int dtype, int64_t n, void* out, const void* y,
                                 const void* dy, double scale) {
  DropoutArgs a{};
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.n = n;
  a.out = out;
  a.in[0] = y;
  a.in[1] = dy;
  a.scale = scale;
  return tables().dropout.data[index].backward(a);
}

const char* run_dropout_summed(size_t index, int dtype, int64_t n, int64_t period, void* out,
                               const void* in, const int64_t* seed, uint32_t threshold,
                               double scale, void* sums) {
  DropoutArgs a{};
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.n = n;
  a.period = period;
  a.out = out;
  a.in[0] = in;
  a.seed = seed;
  a.threshold = threshold;
  a.scale = scale;
  a.order = {1, {n}, {1}};
  a.sums = sums;
  return tables().dropout.data[index].summed(a);
}

const char* run_dropout(size_t index, int dtype, int64_t n, void* out, const void* in,
                        const void* row, const void* residual, int64_t period, const int64_t* seed,
                        uint32_t threshold, double scale, int dims, const int64_t* size,
                        const int64_t* logical_stride) {
  DropoutArgs a{};
  a.in[1] = row;
  a.in[2] = residual;
  a.period = period;
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.n = n;
  a.out = out;
  a.in[0] = in;
  a.seed = seed;
  a.threshold = threshold;
  a.scale = scale;
  a.order.dims = dims;
  for (int d = 0; d < dims; ++d)
    a.order.size[d] = size[d], a.order.logical_stride[d] = logical_stride[d];
  return tables().dropout.data[index].forward(a);
}

// pointers: for each tensor p, g and the states; scalars: for each tensor those of the row.
const char* run_optimizer(size_t index, int dtype, int state_dtype, int64_t count, const int64_t* n,
                          void* const* pointers, const double* scalars, const float* grad_scale,
                          const float* found_inf) {
  const OptimizerKernel& row = tables().optimizer.data[index];
  std::vector<OptimizerTensor> tensors(count);
  for (int64_t k = 0; k < count; ++k) {
    void* const* each = pointers + k * (2 + row.states);
    tensors[k].n = n[k];
    tensors[k].p = each[0];
    tensors[k].g = each[1];
    for (int j = 0; j < row.states; ++j) tensors[k].s[j] = each[2 + j];
    tensors[k].scalars = scalars + k * row.scalars;
  }
  OptimizerArgs a{};
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.state_dtype = static_cast<c10::ScalarType>(state_dtype);
  a.count = count;
  a.tensors = tensors.data();
  a.grad_scale = grad_scale;
  a.found_inf = found_inf;
  return row.step(a);
}

// The same, with a running average of every p.
const char* run_optimizer_averaged(size_t index, int dtype, int state_dtype, int64_t count,
                                   const int64_t* n, void* const* pointers, const double* scalars,
                                   void* const* averages, double weight) {
  const OptimizerKernel& row = tables().optimizer.data[index];
  std::vector<OptimizerTensor> tensors(count);
  for (int64_t k = 0; k < count; ++k) {
    void* const* each = pointers + k * (2 + row.states);
    tensors[k] = {n[k], each[0], each[1], {}, scalars, averages[k], weight};
    for (int j = 0; j < row.states; ++j) tensors[k].s[j] = each[2 + j];
  }
  OptimizerArgs a{};
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.state_dtype = static_cast<c10::ScalarType>(state_dtype);
  a.count = count;
  a.tensors = tensors.data();
  return row.step(a);
}

// The same, rounded stochastically where `seed` is given (tensor k has number k), and where
// `counts` is given with scalars made on the device: from options[k] or *option_at[k], and the step
// counts, floats; and with a running average of every p where `averages` is given.
const char* run_optimizer_extended(size_t index, int dtype, int state_dtype, int64_t count,
                                   const int64_t* n, void* const* pointers, const double* scalars,
                                   const int64_t* seed, uint32_t step, void* const* counts,
                                   const bool* first, const double* options,
                                   const double* const* option_at, void* workspace,
                                   const float* found_inf, void* const* averages,
                                   const double* weights) {
  const OptimizerKernel& row = tables().optimizer.data[index];
  std::vector<OptimizerTensor> tensors(count);
  std::vector<OptimizerNoise> noise(count);
  for (int64_t k = 0; k < count; ++k) {
    void* const* each = pointers + k * (2 + row.states);
    tensors[k] = {n[k], each[0], each[1], {}, scalars, nullptr, 0};
    if (averages) tensors[k].average = averages[k], tensors[k].weight = weights[k];
    for (int j = 0; j < row.states; ++j) tensors[k].s[j] = each[2 + j];
    if (seed) noise[k] = {*seed, step, static_cast<uint32_t>(k)};
  }
  OptimizerArgs a{};
  a.dtype = static_cast<c10::ScalarType>(dtype);
  a.state_dtype = static_cast<c10::ScalarType>(state_dtype);
  a.count = count;
  a.tensors = tensors.data();
  a.found_inf = found_inf;
  if (seed) a.noise = noise.data();
  OptimizerOnDevice on_device{};
  std::deque<float> others[kMaxScalarStates];  // beside the step count: 0.5 each
  std::vector<void*> pointers_to[kMaxScalarStates];
  if (counts) {
    const int taken = count_words(row.options, ',');
    for (int k = 0; k < taken; ++k)
      on_device.options[k] = options[k], on_device.option_at[k] = option_at[k];
    on_device.scalar_states[0] = counts;
    for (int j = 1; j < row.scalar_states; ++j) {
      for (int64_t k = 0; k < count; ++k) pointers_to[j].push_back(&others[j].emplace_back(0.5f));
      on_device.scalar_states[j] = pointers_to[j].data();
    }
    on_device.first = first;
    on_device.scalars = workspace;
    a.on_device = &on_device;
  }
  return row.step(a);
}
const char* optimizer_options(size_t index) { return tables().optimizer.data[index].options; }
bool optimizer_counts(size_t index) { return tables().optimizer.data[index].scalar_states > 0; }
void scalars_for_step(size_t index, const double* options, double step, bool first,
                      double* scalars) {
  double states[kMaxScalarStates] = {step, 0.5, 0.5};
  tables().optimizer.data[index].scalars_for_step(options, first, states, 0, scalars);
}
int64_t numbers_bytes() { return kScalarsBytes; }

const char* run_norm(int dtype, int64_t count, const int64_t* n, void* const* gradients,
                     double* sums, int64_t chunks, const float* grad_scale, double max_norm,
                     float* norm, float* divisor) {
  std::vector<GradientTensor> tensors(count);
  for (int64_t k = 0; k < count; ++k) tensors[k] = {n[k], gradients[k]};
  const GradientNormArgs a{static_cast<c10::ScalarType>(dtype), count, tensors.data(), nullptr};
  const char* error = tables().gradient_norm.sums(a, sums);
  return error ? error
               : tables().gradient_norm.clip(
                     {chunks, sums, grad_scale, max_norm, norm, divisor, nullptr});
}
bool optimizer_in_double(const char* name, const double* scalars, int64_t n, double* p,
                         const double* g, double* const* s) {
  return step_formula(Optimizers{}, name, scalars, n, p, g, s);
}
bool optimizer_in_float(const char* name, const double* scalars, int64_t n, float* p,
                        const float* g, float* const* s) {
  return step_formula(Optimizers{}, name, scalars, n, p, g, s);
}

// ------------------------------------------------------------------------------------------------
// the emulator

void* emulation_allocate(size_t bytes, size_t offset, bool flush) {
  return emulation::allocate(bytes, offset, flush);
}
bool emulation_protect(void* buffer) { return emulation::protect(buffer); }
bool emulation_release(void* buffer) { return emulation::release_buffer(buffer); }
void emulation_order(int order, uint64_t seed) {
  emulation::order = static_cast<emulation::Order>(order);
  emulation::seed = seed;
}
// What was counted since the last call.
void emulation_counters(uint64_t* out) {
  static_assert(sizeof(emulation::Counters) == 9 * sizeof(uint64_t));
  std::memcpy(out, &emulation::counters, sizeof emulation::counters);
  emulation::counters = {};
}
// From now on, whether the sectors of accesses are kept; and requested loads, stores, distinct
// loads, stores since then.
void emulation_record(bool on) {
  emulation::take_sectors();
  emulation::recorder.on = on;
}
void emulation_sectors(uint64_t* out) {
  const emulation::Sectors found = emulation::take_sectors();
  static_assert(sizeof found == 4 * sizeof *out);
  std::memcpy(out, &found, sizeof found);
}
void emulation_multiprocessors(int count) { emulation::multiprocessors = count; }

}  // extern "C"
