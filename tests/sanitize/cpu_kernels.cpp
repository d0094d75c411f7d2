// Runs every kernel of csrc/cpu, for one instruction set, under a sanitizer. Every row, dtype, odd
// sizes and addresses; buffers lie right before or right behind a page that cannot be touched
// (masked vector loads are not instrumented by the compiler: the page sees them), inputs are
// read-only. The values are random and nobody looks at the results.
//
//   cpu_kernels kernels    one call after another, each cut into parts for several threads
//   cpu_kernels threads    eight threads call every kernel at once on the same inputs
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <random>
#include <string_view>
#include <thread>
#include <vector>

#include "../../csrc/cpu/parallel.h"
#include "../../csrc/kernels/tables.h"

namespace fastops {

namespace cpu {
// What csrc/torch defines by at::parallel_for: here, threads that ThreadSanitizer sees whole.
void parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t parts = std::min<int64_t>(3, (n + grain - 1) / grain),
                share = (n + parts - 1) / parts;
  std::vector<std::thread> threads;
  for (int64_t begin = share; begin < n; begin += share)
    threads.emplace_back([=] { body(context, begin, std::min(begin + share, n)); });
  body(context, 0, std::min(share, n));
  for (auto& t : threads) t.join();
}
}  // namespace cpu

namespace {

const Tables kTables = CPU_CAPABILITY::tables();
constexpr c10::ScalarType kDtypes[] = {c10::ScalarType::Float, c10::ScalarType::Double,
                                       c10::ScalarType::BFloat16, c10::ScalarType::Half};
c10::ScalarType real_of(c10::ScalarType t) {
  return t == c10::ScalarType::Double ? t : c10::ScalarType::Float;
}

std::atomic<int> failures{0}, calls{0};
void expect(const char* row, const char* kernel, Error error) {
  ++calls;
  if (!error) return;
  std::printf("%s %s: %s\n", row, kernel, error);
  ++failures;
}

// Memory of one call. `end`: buffers end at the page that cannot be touched; else they begin right
// behind one.
class Buffers {
 public:
  explicit Buffers(bool end, unsigned seed = 1) : end_(end), random_(seed) {}
  ~Buffers() {
    for (const auto& [pages, size] : made_) munmap(pages, size);
  }
  Buffers(const Buffers&) = delete;

  char* raw(size_t bytes) {
    constexpr size_t kPage = 4096;
    const size_t room = std::max<size_t>((bytes + kPage - 1) / kPage * kPage, kPage),
                 size = room + 2 * kPage;
    char* pages =
        static_cast<char*>(mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(pages + kPage, room, PROT_READ | PROT_WRITE);
    made_.emplace_back(pages, size);
    return end_ ? pages + kPage + room - bytes : pages + kPage;
  }
  // n scalars in (0.1, 0.9), which are probabilities too.
  void* values(int64_t n, c10::ScalarType type) {
    char* bytes = raw(static_cast<size_t>(n) * c10::elementSize(type));
    for (int64_t i = 0; i < n; ++i) {
      const double value = 0.1 + static_cast<double>(random_() % 1000) / 1250;
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
  const void* input(int64_t n, c10::ScalarType type) {
    const void* values = this->values(n, type);
    mprotect(static_cast<char*>(made_.back().first) + 4096, made_.back().second - 8192, PROT_READ);
    return values;
  }

 private:
  bool end_;
  std::minstd_rand random_;
  std::vector<std::pair<void*, size_t>> made_;
};

// ------------------------------------------------------------------------------------------------
// kinds

constexpr double kParams[4] = {0.25, 0.75, 0.5, 0.5};

// Inputs are made by one thread and read by all; what is written is each thread's own.
struct Elementwise {
  c10::ScalarType type;
  int64_t n;
  Buffers fixed;
  const void* in[3];
  Elementwise(c10::ScalarType type, int64_t n, bool end) : type(type), n(n), fixed(end) {
    for (auto& i : in) i = fixed.input(n, type);
  }

  void operator()(bool end, unsigned seed = 1) const {
    for (const ElementwiseKernel& row : kTables.elementwise) {
      Buffers b(end, seed);
      ElementwiseArgs a{type, n, b.values(n, type), {in[0], in[1], in[2]}, kParams, nullptr};
      expect(row.name, "forward", row.forward(a));
      expect(row.name, "backward", row.backward(a));
      expect(row.name, "second", row.second(a));
      a.in[0] = a.out;
      expect(row.name, "in place", row.forward(a));
    }
    for (const FusedKernel& row : kTables.fused)
      for (const int64_t period : {n, int64_t{1}, n % 2 ? n : n / 2}) {
        if (period != n && !row.broadcast) continue;
        Buffers b(end, seed);
        FusedArgs a{type, n, period, b.values(n, type), {in[0], in[1], in[2]}, nullptr, nullptr};
        expect(row.name, "forward", row.forward(a));
        if (row.backward) expect(row.name, "backward", row.backward(a));
        if (row.summed) {
          a.sums = b.values(row_blocks_of(n / period) * period, real_of(type));
          expect(row.name, "summed", row.summed(a));
        }
        a.in[0] = a.out;
        expect(row.name, "in place", row.forward(a));
      }
    for (const GateKernel& row : kTables.gate)
      for (const int64_t outer : {1, 3}) {  // the halves of rows; the other operands are dense
        const int64_t inner = n / (2 * outer), size = c10::elementSize(type);
        if (inner == 0) continue;
        Buffers b(end, seed);
        const auto half = [&](const void* packed, int64_t which) {
          char* const begin = static_cast<char*>(const_cast<void*>(packed));
          return GateOperand{begin + which * inner * size, 2 * inner};
        };
        const auto dense = [&](const void* data) {
          return GateOperand{const_cast<void*>(data), inner};
        };
        void* const packed = b.values(2 * outer * inner, type);
        void* const y = b.values(outer * inner, type);
        const GateOperand a = half(in[0], 0), g = half(in[0], 1), u = half(in[2], 0),
                          v = half(in[2], 1), da = half(packed, 0), dg = half(packed, 1);
        expect(row.name, "forward", row.forward({type, outer, inner, {dense(y)}, {a, g}}));
        expect(row.name, "backward",
               row.backward({type, outer, inner, {da, dg}, {a, g, dense(in[1])}}));
        expect(row.name, "tangent", row.tangent({type, outer, inner, {dense(y)}, {a, g, u, v}}));
        expect(row.name, "second",
               row.second({type, outer, inner, {da, dg}, {a, g, dense(in[1]), u, v}}));
      }
    for (const LossKernel& row : kTables.loss) {
      Buffers b(end, seed);
      LossArgs a{};
      a.dtype = row.values ? type : real_of(type);
      if (!row.values && a.dtype != type) continue;
      a.n = n;
      a.in[0] = in[0], a.in[1] = in[1], a.in[2] = in[2], a.grad = in[2];
      a.period = n % 3 ? n : n / 3;
      a.scale = 0.5;
      a.params = kParams;
      a.workspace = b.raw(static_cast<size_t>(loss_workspace(n)));
      unsigned outside = 0;
      a.outside = &outside;
      a.divisor = b.values(1, real_of(type));
      a.out = b.values(1, real_of(type));
      expect(row.name, "total", row.total(a));
      if (!row.values) continue;
      a.out = b.values(n, type);
      for (const bool scalar : {false, true})
        for (const LossLauncher kernel : {row.values, row.d0, row.d1}) {
          a.grad_is_scalar = scalar;
          expect(row.name, "elementwise", kernel(a));
        }
      for (a.to_target = 0; a.to_target <= 2; ++a.to_target)
        expect(row.name, "second", row.second(a));
    }
    for (const DropoutKernel& row : kTables.dropout) {
      Buffers b(end, seed);
      DropoutArgs a{};
      a.dtype = type;
      a.n = n;
      a.out = b.values(n, type);
      std::copy(in, in + 3, a.in);
      auto* seed = reinterpret_cast<int64_t*>(b.raw(8));
      *seed = 42;
      a.seed = seed;
      a.threshold = 1u << 31;
      a.scale = 2;
      a.period = n % 3 ? n : n / 3;
      a.order = {1, {n}, {1}};
      expect(row.name, "contiguous", row.forward(a));
      if (row.backward) expect(row.name, "backward", row.backward(a));
      if (row.summed) {
        a.sums = b.values(row_blocks_of(n / a.period) * a.period, real_of(type));
        expect(row.name, "summed", row.summed(a));
      }
      if (n % 33 == 0) {
        a.order = {3, {3, n / 33, 11}, {11, 33, 1}};
        expect(row.name, "permuted", row.forward(a));
      }
      if (row.inputs == 1) {
        a.in[0] = a.out;
        expect(row.name, "in place", row.forward(a));
      }
    }
  }
};

struct Rows3 {
  c10::ScalarType type;
  int64_t outer, n, inner;
  Buffers fixed;
  const void *x, *dy, *q, *weight;
  const int64_t* target;
  Rows3(c10::ScalarType type, std::array<int64_t, 3> shape, bool end)
      : type(type), outer(shape[0]), n(shape[1]), inner(shape[2]), fixed(end) {
    const int64_t count = outer * n * inner;
    x = fixed.input(count, type), dy = fixed.input(count, type), q = fixed.input(count, type);
    weight = fixed.input(n, real_of(type));
    auto* t = reinterpret_cast<int64_t*>(fixed.raw(static_cast<size_t>(outer * inner) * 8));
    for (int64_t r = 0; r < outer * inner; ++r) t[r] = r % 4 == 3 ? -100 : n - 1 - r % n;
    target = t;
  }

  void operator()(bool end, unsigned seed = 1) const {
    const int64_t count = outer * n * inner;
    for (const SoftmaxKernel& row : kTables.softmax) {
      Buffers b(end, seed);
      SoftmaxArgs a{type, outer, n, inner, b.values(count, type), {x, dy}, nullptr};
      expect(row.name, "forward", row.forward(a));
      expect(row.name, "backward", row.backward(a));
      a.in[0] = a.out;
      expect(row.name, "in place", row.forward(a));
    }
    for (const CrossEntropyKernel& row : kTables.cross_entropy)
      for (const void* w : {weight, static_cast<const void*>(nullptr)})
        for (const double smoothing : {0.0, 0.1}) {
          Buffers b(end, seed);
          CrossEntropyArgs a{};
          a.dtype = type;
          a.outer = outer, a.n = n, a.inner = inner;
          a.x = x, a.target = target, a.weight = w;
          a.ignore_index = -100;
          a.label_smoothing = smoothing;
          a.loss = b.values(outer * inner, real_of(type));
          a.scale = 1;
          void* divisor = b.values(1, real_of(type));
          int64_t bad_row = 0;
          expect(row.name, "divisor", row.divisor(a, divisor, &bad_row));
          if (bad_row != -1) ++failures;
          a.divisor = divisor;
          expect(row.name, "loss", row.forward(a));
          a.grad = b.values(count, type);
          expect(row.name, "loss and gradient", row.forward(a));
          a.second_target = target, a.second_divisor = divisor, a.lam = 0.3;
          expect(row.name, "of two targets", row.forward(a));
          a.second_target = nullptr;
          a.x = a.grad;
          a.z_loss = smoothing;
          a.lse = b.values(outer * inner, real_of(type));
          expect(row.name, "in place", row.forward(a));
          a.x = x, a.target = nullptr, a.divisor = nullptr, a.probability = q;
          expect(row.name, "against probabilities", row.forward_probability(a));
        }
  }
};

void steps(c10::ScalarType type, c10::ScalarType state, Buffers& b) {
  for (const OptimizerKernel& row : kTables.optimizer) {
    double scalars[kMaxScalars], options[kMaxScalars];
    std::fill(options, options + kMaxScalars, 0.5);
    double counted[kMaxScalars] = {3};  // the count of the step, and what else is kept beside it
    row.scalars_for_step(options, false, counted, 0, scalars);
    std::vector<OptimizerTensor> tensors;
    for (const int64_t n : {1, 0, 70, 5, 40'003, 16, 33}) {
      OptimizerTensor t{n,   b.values(n, type), b.input(n, type),
                        {},  scalars,           n % 2 ? b.values(n, real_of(type)) : nullptr,
                        0.25};
      for (int j = 0; j < row.states; ++j) t.s[j] = b.values(n, state);
      tensors.push_back(t);
    }
    OptimizerArgs a{};
    a.dtype = type, a.state_dtype = state;
    a.count = static_cast<int64_t>(tensors.size());
    a.tensors = tensors.data();
    expect(row.name, "step", row.step(a));
    a.grad_scale = static_cast<const float*>(b.input(1, c10::ScalarType::Float));
    expect(row.name, "scaled", row.step(a));
    const std::vector<OptimizerNoise> noise(tensors.size(), {7, 1, 2});
    a.noise = noise.data();
    expect(row.name, "rounded stochastically", row.step(a));
  }
}

void norm(c10::ScalarType type, Buffers& b) {
  std::vector<GradientTensor> tensors;
  int64_t chunks = 0;
  for (const int64_t n : {1, 0, 70, 40'003, 33}) {
    tensors.push_back({n, b.input(n, type)});
    chunks += gradient_norm_chunks(n);
  }
  const GradientNormArgs a{type, static_cast<int64_t>(tensors.size()), tensors.data(), nullptr};
  auto* sums = static_cast<double*>(b.values(chunks, c10::ScalarType::Double));
  expect("norm", "sums", kTables.gradient_norm.sums(a, sums));
  const auto* scale = static_cast<const float*>(b.input(1, c10::ScalarType::Float));
  auto* out = static_cast<float*>(b.values(2, c10::ScalarType::Float));
  expect("norm", "clip",
         kTables.gradient_norm.clip({chunks, sums, scale, 1.0, out, out + 1, nullptr}));
}

// Images, channels and positions: one of each, whole vectors and not, several blocks and chunks.
constexpr std::array<int64_t, 3> kImages[] = {{1, 1, 2},   {37, 5, 1},   {3, 70, 1},  {2, 3, 300},
                                              {4, 33, 49}, {2, 64, 128}, {3, 2, 9000}};

void batch_norms(c10::ScalarType type, Buffers& b) {
  const BatchNormKernel& k = kTables.batch_norm;
  const c10::ScalarType real = real_of(type);
  for (const auto& [images, channels, positions] : kImages) {
    const int64_t n = images * channels * positions;
    BatchNormArgs a{};
    a.dtype = type;
    a.images = images, a.channels = channels, a.positions = positions;
    a.x = b.input(n, type), a.dy = b.input(n, type);
    a.slope = 0.1;
    a.workspace = b.raw(static_cast<size_t>(batch_norm_workspace(images, channels, positions)));
    const void* residual = b.input(n, type);
    void *y = b.values(n, type), *dx = b.values(n, type), *dresidual = b.values(n, type);
    void* totals[] = {b.values(channels, real), b.values(channels, real)};
    const void *weight = b.input(channels, real), *bias = b.input(channels, real);
    for (const bool last : {false, true}) {
      a.channels_last = last;
      a.totals[0] = totals[0], a.totals[1] = totals[1];
      expect("batch_norm", "statistics", k.statistics(a));
      a.mean = b.input(channels, real), a.inverse = b.input(channels, real);
      for (int activation = 0; activation <= static_cast<int>(NormActivation::kMish);
           ++activation) {
        a.activation = static_cast<NormActivation>(activation);
        for (const int how : {0, 1, 2}) {
          a.weight = how == 1 ? nullptr : weight, a.bias = how == 2 ? nullptr : bias;
          a.residual = how == 0 ? nullptr : residual;
          a.y = y, a.dx = dx, a.dresidual = how == 0 ? nullptr : dresidual;
          a.totals[0] = totals[0], a.totals[1] = totals[1];
          expect("batch_norm", "forward", k.forward(a));
          a.residual_is_output = how == 1;
          expect("batch_norm", "sums", k.sums(a));
          if (how == 2) a.totals[0] = a.totals[1] = nullptr;
          expect("batch_norm", "backward", k.backward(a));
        }
      }
    }
  }
}

// Rows and their lengths: one of each, whole vectors and not, several chunks, few and long rows.
constexpr std::array<int64_t, 2> kNormRows[] = {{1, 1},    {37, 5},    {5, 64},   {19, 130},
                                                {1100, 3}, {70, 1000}, {3, 5003}, {5, 20'000}};

void row_norms(c10::ScalarType type, Buffers& b) {
  const RowNormKernel& k = kTables.row_norm;
  const c10::ScalarType real = real_of(type);
  for (const auto& [rows, n] : kNormRows) {
    RowNormArgs a{};
    a.dtype = type;
    a.rows = rows, a.n = n;
    a.eps = 1e-5;
    a.x = b.input(rows * n, type), a.dy = b.input(rows * n, type);
    const void *other = b.input(rows * n, type), *weight = b.input(n, real),
               *bias = b.input(n, real);
    void *sum = b.values(rows * n, type), *dx = b.values(rows * n, type);
    void *mean = b.values(rows, real), *dweight = b.values(n, real), *dbias = b.values(n, real);
    a.y = b.values(rows * n, type), a.inverse = b.values(rows, real);
    for (const bool centered : {false, true})
      for (const int how : {0, 1, 2, 3}) {
        a.centered = centered;
        a.mean = centered ? mean : nullptr;
        a.weight = how == 1 ? nullptr : weight, a.bias = how == 2 ? nullptr : bias;
        a.residual = how == 0 ? nullptr : other, a.sum = how == 0 ? nullptr : sum;
        expect("row_norm", "forward", k.forward(a));
        a.dsum = how == 0 ? nullptr : other;
        a.dx = how == 3 ? nullptr : dx;
        a.dweight = how == 1 ? nullptr : dweight, a.dbias = how == 2 ? nullptr : dbias;
        const int64_t quantities = (a.dweight != nullptr) + (a.dbias != nullptr);
        a.workspace = b.raw(static_cast<size_t>(row_norm_workspace(rows, n, quantities)));
        expect("row_norm", "backward", k.backward(a));
      }
  }
}

// ------------------------------------------------------------------------------------------------
// modes

constexpr std::array<int64_t, 3> kShapes[] = {
    {1, 1, 1},  {5, 10, 1},    {3, 130, 1},   {2, 5003, 1},
    {1, 3, 17}, {1, 20, 1024}, {1, 64, 8200}, {1, 1100, 17},  // tiles, and too long to be kept
    {2, 9, 35}, {3, 2, 16},    {2, 2100, 3},  {40, 1000, 1}};

void kernels() {
  for (const auto type : kDtypes) {
    for (const bool end : {false, true}) {
      for (const int64_t n : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 127, 1023, 1089, 50'001})
        Elementwise(type, n, end)(end);
      for (const auto& shape : kShapes) Rows3(type, shape, end)(end);
      Buffers own(end);
      steps(type, type, own);
      if (real_of(type) != type) steps(type, real_of(type), own);
      if (type == c10::ScalarType::Float) steps(type, c10::ScalarType::BFloat16, own);
      norm(type, own);
      batch_norms(type, own);
      row_norms(type, own);
    }
  }
  // Results that are written past the caches, aligned and not.
  for (const bool end : {false, true}) {
    Elementwise(c10::ScalarType::Float, (int64_t{25} << 18) + 3 * end, end)(end);
    Rows3(c10::ScalarType::Float, {6500, 1024, 1}, end)(end);
  }
}

void threads() {
  for (const auto type : kDtypes) {
    const Elementwise shared(type, 33'033, true);
    const Rows3 rows(type, {40, 1000, 1}, true), columns(type, {2, 9, 2500}, true);
    std::vector<std::thread> workers;
    for (unsigned k = 0; k < 8; ++k)
      workers.emplace_back([&, k] {
        shared(k % 2, k + 1);
        rows(k % 2, k + 1);
        columns(k % 2, k + 1);
        Buffers own(k % 2, k + 1);
        steps(type, type, own);
        norm(type, own);
        batch_norms(type, own);
        row_norms(type, own);
      });
    for (auto& w : workers) w.join();
  }
}

}  // namespace
}  // namespace fastops

int main(int count, char** arguments) {
  if (count != 2) return 64;
  const std::string_view mode = arguments[1];
  if (mode == "kernels")
    fastops::kernels();
  else if (mode == "threads")
    fastops::threads();
  else
    return 64;
  std::printf("%d calls, %d failures\n", fastops::calls.load(), fastops::failures.load());
  return fastops::failures != 0;
}
