// Dropout, alone and fused with its neighbors, as torch sees it. The mask is a function of a seed,
// and made again in backward: nothing else is saved. The seed is one torch.randint, which is where
// manual_seed, fork_rng, generators, graph capture and vmap's randomness come in.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "bind.h"
#include "layout.h"
#include "register.h"

namespace fastops {
namespace {

using at::Tensor;

const KernelTable<DropoutKernel>& table(c10::DeviceType device) { return tables(device).dropout; }

// A kernel of one input. Where that has no `backward` it is linear, and its own derivative;
// elsewhere the output tells what was dropped.
struct Family {
  size_t number;  // in the table
  const char* name;
  bool linear;
  Op<Tensor(const Tensor&, double, const Tensor&)> forward;  // (input, p, seed)
  Op<void(Tensor&, double, const Tensor&)> inplace;
  Op<Tensor(const Tensor&, const Tensor&, double)> backward;  // (output, grad, p)
};

// residual + dropout(input + bias)
struct AddFamily {
  size_t number;
  const char* name;
  const Family* mask;  // dropout alone
  Op<Tensor(const Tensor&, const Tensor&, const Tensor&, double, const Tensor&)> forward;
  // (grad, p, seed, whether the gradient to bias is wanted) -> (to input, to bias)
  Op<std::tuple<Tensor, Tensor>(const Tensor&, double, const Tensor&, bool)> backward;
};

// ------------------------------------------------------------------------------------------------
// kernels

void check_arguments(const char* name, const Tensor& input, double p, const Tensor& seed) {
  check_dtype(name, input);
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "fastops::", name, ": p must be in [0, 1), got ", p);
  TORCH_CHECK(
      seed.scalar_type() == at::kLong && seed.numel() == 1 && seed.device() == input.device(),
      "fastops::", name, ": seed must be one int64 on ", input.device(), ", got ", seed.toString(),
      seed.sizes(), " on ", seed.device());
}

DropoutArgs arguments_of(const Tensor& out, std::initializer_list<const Tensor*> in, double p) {
  DropoutArgs a{};
  a.dtype = out.scalar_type();
  a.n = out.numel();
  a.out = out.mutable_data_ptr();
  size_t k = 0;
  for (const Tensor* t : in) a.in[k++] = t->const_data_ptr();
  a.scale = 1 / (1 - p);
  a.stream = stream_of(out);
  return a;
}

void run(size_t number, const Tensor& out, std::initializer_list<const Tensor*> in,
         const LogicalOrder& order, double p, const Tensor& seed, const Tensor& sums = Tensor()) {
  if (out.numel() == 0) return;
  const c10::DeviceGuard guard(out.device());
  const DropoutKernel& k = table(out.device().type()).data[number];
  DropoutArgs a = arguments_of(out, in, p);
  a.period = out.dim() ? out.size(-1) : 1;
  a.seed = seed.const_data_ptr<int64_t>();
  a.threshold = static_cast<uint32_t>(std::min(std::nearbyint(std::ldexp(p, 32)), 4294967295.0));
  a.order = order;
  if (sums.defined()) a.sums = sums.mutable_data_ptr();
  check(k.name, (sums.defined() ? k.summed : k.forward)(a));
}

// Of one tensor, in the layout that torch's elementwise ops would give the result.
Tensor result_of(size_t number, const Tensor& input, double p, const Tensor& seed) {
  const Tensor x = dense(input);
  if (const auto order = logical_order(x)) {
    Tensor y = x.is_same(input) ? output_like(x) : x;
    run(number, y, {&x}, *order, p, seed);
    return y;
  }
  // The mask follows the logical order, and x is too permuted for the kernels to follow that.
  const Tensor z = x.contiguous();
  run(number, z, {&z}, *logical_order(z), p, seed);
  return output_like(x).copy_(z);
}

struct Forward {
  const Family& f;
  Tensor operator()(const Tensor& input, double p, const Tensor& seed) const {
    check_arguments(f.name, input, p, seed);
    return result_of(f.number, input, p, seed);
  }
};

struct Inplace {
  const Family& f;
  void operator()(Tensor& self, double p, const Tensor& seed) const {
    check_arguments(f.name, self, p, seed);
    if (self.is_non_overlapping_and_dense())
      if (const auto order = logical_order(self))
        return run(f.number, self, {&self}, *order, p, seed);
    at::assert_no_internal_overlap(self);
    self.copy_(result_of(f.number, self, p, seed));
  }
};

struct Backward {
  const Family& f;
  Tensor operator()(const Tensor& output, const Tensor& grad, double p) const {
    check_dtype(f.name, output);
    check_like(f.name, "grad", grad, output);
    TORCH_CHECK(grad.sizes() == output.sizes(), f.name, "_backward: expected a grad of size ",
                output.sizes(), ", got ", grad.sizes());
    const Tensor y = dense(output), dy = matching(grad, y);
    Tensor dx = output_like(y);
    if (y.numel() == 0) return dx;
    const c10::DeviceGuard guard(y.device());
    check(f.name, table(y.device().type()).data[f.number].backward(arguments_of(dx, {&y, &dy}, p)));
    return dx;
  }
};

struct AddForward {
  const AddFamily& f;
  Tensor operator()(const Tensor& input, const Tensor& bias, const Tensor& residual, double p,
                    const Tensor& seed) const {
    check_arguments(f.name, input, p, seed);
    check_like(f.name, "bias", bias, input);
    check_row(f.name, "bias", bias, input);
    check_like(f.name, "residual", residual, input);
    TORCH_CHECK(residual.sizes() == input.sizes(), f.name,
                ": expected a residual of the input's shape ", input.sizes(), ", got ",
                residual.sizes());
    const Tensor x = input.contiguous(), b = bias.contiguous(), r = residual.contiguous();
    Tensor y = output_like(x);
    run(f.number, y, {&x, &b, &r}, *logical_order(y), p, seed);
    return y;
  }
};

struct AddBackward {
  const AddFamily& f;
  std::tuple<Tensor, Tensor> operator()(const Tensor& grad, double p, const Tensor& seed,
                                        bool with_bias) const {
    check_arguments(f.name, grad, p, seed);
    TORCH_CHECK(grad.dim() >= 1, f.name, "_backward: expected a grad of 1 or more dimensions");
    if (with_bias && has_rows(grad)) {
      const Tensor g = grad.contiguous(), row_blocks = row_blocks_beside(g);
      Tensor dx = output_like(g);
      run(f.mask->number, dx, {&g}, *logical_order(dx), p, seed, row_blocks);
      return {dx, sum_of_row_blocks(row_blocks, grad.scalar_type())};
    }
    const Tensor dx = result_of(f.mask->number, grad, p, seed);
    return {dx, with_bias ? sum_to_row(dx) : output_beside(dx, {0}, dx.scalar_type())};
  }
};

// ------------------------------------------------------------------------------------------------
// derivatives

struct ForwardDerivative {
  using Family = fastops::Family;
  enum { kSeedOrOutput };
  static bool reads_input(const Family&, double, const Tensor&) { return false; }
  static Tensor jvp(const Family& f, const Tensor& y, const DualTensor& x, double p,
                    const DualTensor& seed) {
    return f.linear ? f.forward.call(x.tangent, p, seed.value) : f.backward.call(y, x.tangent, p);
  }
  static void save(const Family& f, Saved& s, const Tensor& y, const Tensor&, double p,
                   const Tensor& seed) {
    f.linear ? s.input(seed) : s.output(y);
    s.value(p);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const Family& f = *static_cast<const Family*>(c.op);
    const Tensor& saved = c.saved[kSeedOrOutput];
    const double p = c.values[0].toDouble();
    return {f.linear ? f.forward.call(grads[0], p, saved) : f.backward.call(saved, grads[0], p)};
  }
};

// Of backward(y, dy), which is linear in dy, and does not change where y does but at the kinks.
struct BackwardDerivative {
  using Family = fastops::Family;
  enum { kOutput, kGrad };
  static Tensor jvp(const Family& f, const Tensor& dx, const DualTensor& y, const DualTensor& grad,
                    double p) {
    return grad.moves() ? f.backward.call(y.value, grad.tangent, p) : at::zeros_like(dx);
  }
  static void save(const Family&, Saved& s, const Tensor&, const Tensor& y, const Tensor&,
                   double p) {
    s.input(y);
    s.value(p);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const Family& f = *static_cast<const Family*>(c.op);
    variable_list result(2);
    if (c.wants(kOutput)) result[kOutput] = at::zeros_like(grads[0]);
    if (c.wants(kGrad))
      result[kGrad] = f.backward.call(c.saved[kOutput], grads[0], c.values[0].toDouble());
    return result;
  }
};

struct AddForwardDerivative {
  using Family = AddFamily;
  enum { kInput, kBias, kResidual };
  static Tensor jvp(const Family& f, const Tensor& y, const DualTensor& x, const DualTensor& bias,
                    const DualTensor& residual, double p, const DualTensor& seed) {
    Tensor t = sum_of_defined(
        x.tangent, bias.moves() ? bias.tangent.expand(y.sizes()).contiguous() : Tensor());
    if (t.defined()) t = f.mask->forward.call(t, p, seed.value);
    return sum_of_defined(t, residual.tangent);
  }
  static void save(const Family&, Saved& s, const Tensor&, const Tensor&, const Tensor&,
                   const Tensor&, double p, const Tensor& seed) {
    s.input(seed);
    s.value(p);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const Family& f = *static_cast<const Family*>(c.op);
    const Tensor &dy = grads[0], &seed = c.saved[0];
    variable_list result(4);
    if (c.wants(kInput) || c.wants(kBias)) {
      const auto [dx, db] = f.backward.call(dy, c.values[0].toDouble(), seed, c.wants(kBias));
      result[kInput] = dx;
      if (c.wants(kBias)) result[kBias] = db;
    }
    if (c.wants(kResidual)) result[kResidual] = dy;
    return result;
  }
};

// Of (dx, db) = backward(dy), where dx is dropout of dy, and db is the sum of its rows.
struct AddBackwardDerivative {
  using Family = AddFamily;
  static std::tuple<Tensor, Tensor> jvp(const Family& f, const std::tuple<Tensor, Tensor>&,
                                        const DualTensor& grad, double p, const DualTensor& seed,
                                        bool with_bias) {
    const Tensor t = f.mask->forward.call(grad.tangent, p, seed.value);
    return {t, with_bias ? sum_to_row(t) : Tensor()};
  }
  static void save(const Family&, Saved& s, const std::tuple<Tensor, Tensor>& y, const Tensor&,
                   double p, const Tensor& seed, bool) {
    s.input(seed);
    s.value(p, std::get<0>(y).sym_sizes());
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const Family& f = *static_cast<const Family*>(c.op);
    // What flows to db flows to every row of dx. Where db was not asked for it is no row.
    const bool of_row = grads.size() > 1 && grads[1].defined() && grads[1].sym_numel() != 0;
    Tensor v = grads[0];
    if (of_row)
      v = v.defined() ? v + grads[1] : grads[1].expand_symint(c.values[1].toSymIntVector());
    return {f.mask->forward.call(v, c.values[0].toDouble(), c.saved[0])};
  }
};

// ------------------------------------------------------------------------------------------------
// registration

// They live as long as the process.
constinit std::vector<const Family*> families;
constinit std::vector<const AddFamily*> add_families;

const Family& mask_family() {
  for (const Family* f : families)
    if (f->linear) return *f;
  TORCH_INTERNAL_ASSERT(false, "no kernel is dropout alone");
}

void define(torch::Library& m, size_t number, const DropoutKernel& k) {
  auto& f = *new Family{number, k.name, k.backward == nullptr, {}, {}, {}};
  families.push_back(&f);
  const std::string n = k.name;
  Registration(m, f.forward, n, "(Tensor input, float p, Tensor seed) -> Tensor")
      .kernel(Forward{f})
      .derivative<ForwardDerivative>(f);
  Registration(m, f.inplace, n + "_", "(Tensor(a!) self, float p, Tensor seed) -> ()")
      .kernel(Inplace{f})
      .inplace_derivative<ForwardDerivative>(f);
  if (f.linear) return;
  Registration(m, f.backward, n + "_backward", "(Tensor output, Tensor grad, float p) -> Tensor")
      .kernel(Backward{f})
      .derivative<BackwardDerivative>(f);
}

void define_add(torch::Library& m, size_t number, const DropoutKernel& k) {
  auto& f = *new AddFamily{number, k.name, &mask_family(), {}, {}};
  add_families.push_back(&f);
  const std::string n = k.name;
  Registration(m, f.forward, n,
               "(Tensor input, Tensor bias, Tensor residual, float p, Tensor seed) -> Tensor")
      .kernel(AddForward{f})
      .derivative<AddForwardDerivative>(f);
  Registration(m, f.backward, n + "_backward",
               "(Tensor grad, float p, Tensor seed, bool with_bias=True) -> (Tensor, Tensor)")
      .kernel(AddBackward{f})
      .derivative<AddBackwardDerivative>(f);
}

// torch.nn.functional.dropout's own cases around the op: nothing to do, and nothing left.
struct UserDropout {
  const Family& f;
  Tensor operator()(Tensor& input, double p, bool training, bool inplace,
                    const std::optional<at::Generator>& generator) const {
    TORCH_CHECK_VALUE(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ",
                      p);
    if (!training || p == 0 || input.sym_numel() == 0) return input;
    if (p == 1) {
      const Tensor none = at::zeros({}, input.options());
      return inplace ? input.mul_(none) : at::mul(input, none);
    }
    const Tensor seed = at::randint(std::numeric_limits<int64_t>::max(), {}, generator,
                                    input.options().dtype(at::kLong));
    if (!inplace) return f.forward.call(input, p, seed);
    f.inplace.call(input, p, seed);
    return input;
  }
};

}  // namespace

void register_dropout(torch::Library& m) {
  for (const int inputs : {1, 3}) {  // the fused ones make use of the others
    size_t i = 0;
    for (const DropoutKernel& k : table(c10::DeviceType::CPU)) {
      if (k.inputs == inputs) (inputs == 1 ? define : define_add)(m, i, k);
      ++i;
    }
  }
}

void bind_dropout(pybind11::module_& m) {
  for (const Family* f : families) {
    if (f->linear) {
      def(m, f->name, UserDropout{*f}, pybind11::arg("input"), pybind11::arg("p"),
          pybind11::arg("training"), pybind11::arg("inplace") = false,
          pybind11::arg("generator") = pybind11::none());
      continue;
    }
    def(m, f->name, [f](const Tensor& input, double p, const Tensor& seed) {
      return f->forward.call(input, p, seed);
    });
    def(m, std::string(f->name) + "_", [f](Tensor& self, double p, const Tensor& seed) {
      f->inplace.call(self, p, seed);
      return self;
    });
  }
  for (const AddFamily* f : add_families)
    def(m, f->name,
        [f](const Tensor& input, const Tensor& bias, const Tensor& residual, double p,
            const Tensor& seed) { return f->forward.call(input, bias, residual, p, seed); });
}

}  // namespace fastops
