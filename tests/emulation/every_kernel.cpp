// Runs every kernel of csrc/cuda once per dtype on a few sizes and addresses, for a sanitizer to
// watch: the values are random and nobody looks at the results. `every_kernel N` does so for the
// first N dtypes; it prints what a launcher returned and ends with 1, or 0.
#include <cuda_runtime.h>

#include <array>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/kernels/tables.h"

namespace fastops {
namespace {

struct Dtype {
  c10::ScalarType type, real;
  size_t size;
};
constexpr Dtype kDtypes[] = {{c10::ScalarType::Float, c10::ScalarType::Float, 4},
                             {c10::ScalarType::BFloat16, c10::ScalarType::Float, 2},
                             {c10::ScalarType::Double, c10::ScalarType::Double, 8},
                             {c10::ScalarType::Half, c10::ScalarType::Float, 2}};

int failures = 0;
std::mt19937_64 random_bits(1);

void expect(const char* row, const char* kernel, Error error) {
  if (!error) return;
  std::printf("%s %s: %s\n", row, kernel, error);
  ++failures;
}

// Buffers of one run. `offset` elements past a 16-byte boundary; filled with small positive scalars
// of any dtype.
struct Buffers {
  size_t offset;
  std::vector<void*> made;
  ~Buffers() {
    for (void* buffer : made) failures += !emulation::release_buffer(buffer);
  }
  void* raw(size_t bytes, size_t shift = 0) {
    made.push_back(emulation::allocate(bytes, shift, false));
    return made.back();
  }
  void* values(int64_t n, c10::ScalarType type) {
    const size_t size = type == c10::ScalarType::Double  ? 8
                        : type == c10::ScalarType::Float ? 4
                                                         : 2;
    auto* bytes = static_cast<unsigned char*>(raw(static_cast<size_t>(n) * size, offset * size));
    for (int64_t i = 0; i < n; ++i) {
      const double value =
          0.1 + static_cast<double>(random_bits() % 1000) / 1250;  // in (0, 1): probabilities too
      if (type == c10::ScalarType::Double) reinterpret_cast<double*>(bytes)[i] = value;
      if (type == c10::ScalarType::Float)
        reinterpret_cast<float*>(bytes)[i] = static_cast<float>(value);
      if (type == c10::ScalarType::Half)
        reinterpret_cast<c10::Half*>(bytes)[i] = static_cast<float>(value);
      if (type == c10::ScalarType::BFloat16)
        reinterpret_cast<c10::BFloat16*>(bytes)[i] = static_cast<float>(value);
    }
    return bytes;
  }
};

// ------------------------------------------------------------------------------------------------
// kinds

constexpr double kParams[16] = {0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5,
                                0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5};

void map(const Dtype& d, int64_t n, Buffers b) {
  for (const ElementwiseKernel& row : cuda::elementwise_kernels) {
    ElementwiseArgs a{d.type, n, b.values(n, d.type), {}, kParams, nullptr};
    for (auto& in : a.in) in = b.values(n, d.type);
    expect(row.name, "forward", row.forward(a));
    expect(row.name, "backward", row.backward(a));
    expect(row.name, "second", row.second(a));
  }
}

void fused(const Dtype& d, int64_t n, Buffers b) {
  for (const FusedKernel& row : cuda::fused_kernels) {
    const int64_t period = row.broadcast ? (n % 2 ? n : n / 2) : n;
    FusedArgs a{d.type, n, period, b.values(n, d.type), {}, nullptr, nullptr};
    for (auto& in : a.in) in = b.values(n, d.type);
    expect(row.name, "forward", row.forward(a));
    if (row.backward) expect(row.name, "backward", row.backward(a));
    if (!row.summed) continue;
    for (const int64_t width : {n, int64_t{7}, int64_t{8}}) {
      a.period = width;
      a.n = n / width * width;
      a.sums = b.values(row_blocks_of(n / width) * width, d.real);
      expect(row.name, "summed", row.summed(a));
    }
  }
}

void gate(const Dtype& d, int64_t outer, int64_t inner, Buffers b) {
  for (const GateKernel& row : cuda::gate_kernels) {
    GateArgs a{};
    a.dtype = d.type;
    a.outer = outer;
    a.inner = inner;
    for (auto& out : a.out) out = {b.values(2 * outer * inner, d.type), 2 * inner};
    for (auto& in : a.in) in = {b.values(outer * inner, d.type), inner};
    expect(row.name, "forward", row.forward(a));
    expect(row.name, "backward", row.backward(a));
    expect(row.name, "tangent", row.tangent(a));
    expect(row.name, "second", row.second(a));
  }
}

void rescale(const Dtype& d, int64_t n, Buffers b) {
  for (const CrossEntropyKernel& row : cuda::cross_entropy_kernels)
    expect(row.name, "rescale",
           row.rescale({d.type, n, b.values(n, d.type), b.values(1, d.type), false, nullptr}));
}

void reduce(const Dtype& d, int64_t n, Buffers b) {
  for (const LossKernel& row : cuda::loss_kernels) {
    LossArgs a{};
    a.dtype = row.values ? d.type : d.real;
    a.n = n;
    a.in[0] = b.values(n, a.dtype);
    a.in[1] = b.values(n, a.dtype);
    a.period = n % 3 ? n : n / 3;
    a.in[2] = b.values(a.period, a.dtype);
    a.grad = b.values(n, a.dtype);
    a.scale = 0.5;
    a.params = kParams;
    a.workspace = b.raw(static_cast<size_t>(loss_workspace(n)));
    a.divisor = b.values(1, d.real);
    a.out = b.values(1, d.real);
    expect(row.name, "total", row.total(a));
    if (!row.values) continue;
    a.out = b.values(n, d.type);
    for (const LossLauncher kernel : {row.values, row.d0, row.d1})
      expect(row.name, "elementwise", kernel(a));
    for (a.to_target = 0; a.to_target <= 2; ++a.to_target)
      expect(row.name, "second", row.second(a));
  }
}

void rows(const Dtype& d, int64_t outer, int64_t n, int64_t inner, Buffers b) {
  const int64_t count = outer * n * inner;
  for (const SoftmaxKernel& row : cuda::softmax_kernels) {
    SoftmaxArgs a{d.type,
                  outer,
                  n,
                  inner,
                  b.values(count, d.type),
                  {b.values(count, d.type), b.values(count, d.type)},
                  nullptr};
    expect(row.name, "forward", row.forward(a));
    expect(row.name, "backward", row.backward(a));
  }
  for (const CrossEntropyKernel& row : cuda::cross_entropy_kernels) {
    CrossEntropyArgs a{};
    a.dtype = d.type;
    a.outer = outer, a.n = n, a.inner = inner;
    a.x = b.values(count, d.type);
    auto* target = static_cast<int64_t*>(b.raw(static_cast<size_t>(outer * inner) * 8));
    for (int64_t r = 0; r < outer * inner; ++r) target[r] = r % 4 == 3 ? -100 : r % n;
    a.target = target;
    a.weight = b.values(n, d.real);
    a.ignore_index = -100;
    a.label_smoothing = 0.1;
    a.loss = b.values(outer * inner, d.real);
    a.scale = 1;
    void* divisor = b.values(1, d.real);
    int64_t bad_row = 0;
    expect(row.name, "divisor", row.divisor(a, divisor, &bad_row));
    a.divisor = divisor;
    expect(row.name, "loss", row.forward(a));
    a.grad = b.values(count, d.type);
    expect(row.name, "loss and gradient", row.forward(a));
    a.second_target = target;
    a.second_divisor = divisor;
    a.lam = 0.3;
    expect(row.name, "of two targets", row.forward(a));
    a.second_target = nullptr;
    a.grad = const_cast<void*>(a.x);
    a.z_loss = 0.1;
    a.lse = b.values(outer * inner, d.real);
    expect(row.name, "gradient in place", row.forward(a));
    a.target = nullptr;
    a.divisor = nullptr;
    a.probability = b.values(count, d.type);
    expect(row.name, "against probabilities", row.forward_probability(a));
  }
}

void random(const Dtype& d, Buffers b) {
  constexpr int64_t kN = 3 * 5 * 7 * 11;
  for (const DropoutKernel& row : cuda::dropout_kernels) {
    DropoutArgs a{};
    a.dtype = d.type;
    a.n = kN;
    a.out = b.values(kN, d.type);
    for (auto& in : a.in) in = b.values(kN, d.type);
    auto* seed = static_cast<int64_t*>(b.raw(8));
    *seed = 42;
    a.seed = seed;
    a.threshold = 1u << 31;
    a.scale = 2;
    a.period = 11;
    if (row.backward) expect(row.name, "backward", row.backward(a));
    a.order = {1, {kN}, {1}};
    expect(row.name, "contiguous", row.forward(a));
    a.order = {4, {3, 7, 11, 5}, {5 * 7 * 11, 11, 1, 7 * 11}};
    expect(row.name, "strided", row.forward(a));
    if (!row.summed) continue;
    for (const int64_t width : {11, 7, 5}) {
      a.period = width;
      a.sums = b.values(row_blocks_of(kN / width) * width, d.real);
      expect(row.name, "summed", row.summed(a));
    }
  }
}

void step(const Dtype& d, c10::ScalarType state, Buffers b) {
  for (const OptimizerKernel& row : cuda::optimizer_kernels) {
    std::vector<OptimizerTensor> tensors;
    for (const int64_t n : {1, 0, 70, 4100}) {
      OptimizerTensor t{
          n, b.values(n, d.type), b.values(n, d.type), {}, kParams, b.values(n, d.real), 0.25};
      for (int j = 0; j < row.states; ++j) t.s[j] = b.values(n, state);
      tensors.push_back(t);
    }
    const auto* ones = static_cast<const float*>(b.values(1, c10::ScalarType::Float));
    OptimizerArgs a{};
    a.dtype = d.type;
    a.state_dtype = state;
    a.count = static_cast<int64_t>(tensors.size());
    a.tensors = tensors.data();
    a.grad_scale = ones;
    expect(row.name, "step", row.step(a));
    const std::vector<OptimizerNoise> noise(tensors.size(), {7, 1, 2});
    auto* found = static_cast<float*>(b.raw(sizeof(float)));
    *found = 0;
    a.noise = noise.data();
    a.found_inf = found;
    expect(row.name, "rounded stochastically", row.step(a));
    // With scalars made on the device.
    std::vector<void*> scalar_states[kMaxScalarStates];
    for (int j = 0; j < row.scalar_states; ++j)
      for (size_t k = 0; k < tensors.size(); ++k) {
        auto* number = static_cast<float*>(b.raw(sizeof(float)));
        *number = j == 0 ? 1.0f : 0.5f;
        scalar_states[j].push_back(number);
      }
    const bool first[] = {false, true, false, true};
    OptimizerOnDevice on_device{};
    for (double& option : on_device.options) option = 0.5;
    auto* lr = static_cast<double*>(b.raw(sizeof(double)));
    *lr = 0.25;
    on_device.option_at[0] = lr;
    for (int j = 0; j < row.scalar_states; ++j)
      on_device.scalar_states[j] = scalar_states[j].data();
    on_device.first = first;
    on_device.scalars = b.raw(tensors.size() * static_cast<size_t>(kScalarsBytes));
    a.on_device = &on_device;
    expect(row.name, "step on the device", row.step(a));
  }
}

void norm(const Dtype& d, Buffers b) {
  std::vector<GradientTensor> tensors;
  int64_t chunks = 0;
  for (const int64_t n : {1, 0, 70, 17'000}) {
    tensors.push_back({n, b.values(n, d.type)});
    chunks += gradient_norm_chunks(n);
  }
  const GradientNormArgs a{d.type, static_cast<int64_t>(tensors.size()), tensors.data(), nullptr};
  auto* sums = static_cast<double*>(b.raw(static_cast<size_t>(chunks) * sizeof(double)));
  expect("norm", "sums", cuda::gradient_norm_kernel.sums(a, sums));
  auto* out = static_cast<float*>(b.raw(2 * sizeof(float)));
  expect("norm", "clip",
         cuda::gradient_norm_kernel.clip({chunks, sums, nullptr, 1.0, out, out + 1, nullptr}));
}

}  // namespace
}  // namespace fastops

int main(int count, char** arguments) {
  if (count != 2) return 64;
  using namespace fastops;
  emulation::explain_faults();
  emulation::multiprocessors = 1;
  for (int k = 0; k < std::min(std::atoi(arguments[1]), 4); ++k) {
    const Dtype& d = kDtypes[k];
    for (const size_t offset : {size_t{0}, size_t{1}}) {
      const Buffers fresh{offset, {}};
      map(d, 1003, fresh);
      fused(d, 1003, fresh);
      fused(d, 2048, fresh);
      gate(d, 9, 37, fresh);
      gate(d, 3, 64, fresh);
      rescale(d, 1003, fresh);
      reduce(d, 1003, fresh);
      reduce(d, 16'390, fresh);
      for (const auto& [outer, n, inner] :
           {std::array<int64_t, 3>{5, 10, 1}, {2, 2100, 1}, {1, 16'500, 1}, {2, 9, 35}})
        rows(d, outer, n, inner, fresh);
      random(d, fresh);
      step(d, d.type, fresh);
      if (d.real != d.type) step(d, d.real, fresh);
      if (d.type == c10::ScalarType::Float) step(d, c10::ScalarType::BFloat16, fresh);
      norm(d, fresh);
    }
  }
  std::printf(failures ? "%d failures\n" : "nothing found\n", failures);
  return failures != 0;
}
