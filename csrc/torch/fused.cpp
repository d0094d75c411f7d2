// Activations fused with the addition before them, as torch sees them: schemas, checks and
// derivatives.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/add.h>

#include "bind.h"
#include "layout.h"
#include "register.h"

namespace fastops {
namespace {

using at::Tensor;

const KernelTable<FusedKernel>& table(c10::DeviceType device) { return tables(device).fused; }

// activation(x + t), with t of x's shape or one row that is added to all of them.
struct Family {
  size_t number;  // in the table
  const char* name;
  bool broadcast;
  Op<Tensor(const Tensor&, const Tensor&)> forward;
  Op<void(Tensor&, const Tensor&)> inplace;
  // (grad, x, t, whether the gradient to t is wanted) -> (to x, to t); where t is broadcast
  Op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, bool)> backward;
  // Of the activation, of the sum or, where t is not broadcast, of the output.
  Op<Tensor(const Tensor&, const Tensor&)> activation_backward;
  Op<Tensor(const Tensor&, const Tensor&, const Tensor&)> activation_second;
};

// ------------------------------------------------------------------------------------------------
// kernels

void check_inputs(const Family& f, const Tensor& input, const Tensor& other) {
  check_dtype(f.name, input);
  check_like(f.name, f.broadcast ? "bias" : "second tensor", other, input);
  if (f.broadcast) return check_row(f.name, "bias", other, input);
  TORCH_CHECK(input.sizes() == other.sizes(), f.name, ": expected two tensors of one shape, got ",
              input.sizes(), " and ", other.sizes());
}

void run(const Family& f, FusedLauncher FusedKernel::* kernel, const Tensor& out,
         std::initializer_list<const Tensor*> in, const Tensor& sums = Tensor()) {
  if (out.numel() == 0) return;
  const c10::DeviceGuard guard(out.device());
  const FusedKernel& k = table(out.device().type()).data[f.number];
  FusedArgs a{};
  a.dtype = out.scalar_type();
  a.n = out.numel();
  a.period = f.broadcast ? out.size(-1) : out.numel();
  a.out = out.mutable_data_ptr();
  if (sums.defined()) a.sums = sums.mutable_data_ptr();
  a.stream = stream_of(out);
  size_t i = 0;
  for (const Tensor* t : in) a.in[i++] = t->const_data_ptr();
  check(f.name, (k.*kernel)(a));
}

// x in a memory order in which `other` can be walked beside it, and that in the same.
std::pair<Tensor, Tensor> walkable(const Family& f, const Tensor& input, const Tensor& other) {
  const Tensor x = f.broadcast ? input.contiguous() : dense(input);
  return {x, f.broadcast ? other.contiguous() : matching(other, x)};
}

struct Forward {
  const Family& f;
  Tensor operator()(const Tensor& input, const Tensor& other) const {
    check_inputs(f, input, other);
    const auto [x, t] = walkable(f, input, other);
    Tensor y = x.is_same(input) ? output_like(x) : x;
    run(f, &FusedKernel::forward, y, {&x, &t});
    return y;
  }
};

struct Inplace {
  const Family& f;
  void operator()(Tensor& self, const Tensor& other) const {
    check_inputs(f, self, other);
    at::assert_no_internal_overlap(self);
    at::assert_no_partial_overlap(self, other);
    const auto [x, t] = walkable(f, self, other);
    run(f, &FusedKernel::forward, x, {&x, &t});
    if (!x.is_same(self)) self.copy_(x);
  }
};

struct Backward {
  const Family& f;
  std::tuple<Tensor, Tensor> operator()(const Tensor& grad, const Tensor& input, const Tensor& bias,
                                        bool with_bias) const {
    check_inputs(f, input, bias);
    check_like(f.name, "grad", grad, input);
    TORCH_CHECK(grad.sizes() == input.sizes(), f.name,
                "_backward: expected a grad of the input's shape ", input.sizes(), ", got ",
                grad.sizes());
    const Tensor x = input.contiguous(), t = bias.contiguous(), dy = grad.contiguous();
    Tensor dx = output_like(x);
    if (with_bias && has_rows(x)) {
      const Tensor row_blocks = row_blocks_beside(x);
      run(f, &FusedKernel::summed, dx, {&x, &t, &dy}, row_blocks);
      return {dx, sum_of_row_blocks(row_blocks, t.scalar_type())};
    }
    run(f, &FusedKernel::backward, dx, {&x, &t, &dy});
    return {dx, with_bias ? sum_to_row(dx) : output_beside(dx, {0}, dx.scalar_type())};
  }
};

// ------------------------------------------------------------------------------------------------
// derivatives

struct ForwardDerivative {
  using Family = fastops::Family;
  enum { kInput, kOther };
  static bool reads_input(const Family& f, const Tensor&) { return f.broadcast; }
  static Tensor jvp(const Family& f, const Tensor& y, const DualTensor& x,
                    const DualTensor& other) {
    const Tensor of_other =
        f.broadcast && other.moves() ? other.tangent.expand(y.sizes()) : other.tangent;
    const Tensor t = sum_of_defined(x.tangent, of_other);
    return f.activation_backward.call(f.broadcast ? at::add(x.value, other.value) : y, t);
  }
  static void save(const Family& f, Saved& s, const Tensor& y, const Tensor& x,
                   const Tensor& other) {
    if (!f.broadcast) return s.output(y);
    s.input(x);
    s.input(other);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const Family& f = *static_cast<const Family*>(c.op);
    if (!f.broadcast) {
      const Tensor dx = f.activation_backward.call(c.saved[0], grads[0]);
      return {dx, dx};
    }
    const auto [dx, dt] =
        f.backward.call(grads[0], c.saved[kInput], c.saved[kOther], c.wants(kOther));
    return {dx, c.wants(kOther) ? dt : Tensor()};
  }
};

// Of (dx, dt) = backward(dy, x, t), where dx = dy a'(x + t) and dt is the sum of the rows of dx.
struct BackwardDerivative {
  using Family = fastops::Family;
  enum { kGrad, kInput, kBias };
  static std::tuple<Tensor, Tensor> jvp(const Family& f, const std::tuple<Tensor, Tensor>& y,
                                        const DualTensor& grad, const DualTensor& x,
                                        const DualTensor& bias, bool with_bias) {
    const Tensor sum = at::add(x.value, bias.value);
    Tensor t;
    if (grad.moves()) t = f.activation_backward.call(sum, grad.tangent);
    const Tensor of_sum =
        sum_of_defined(x.tangent, bias.moves() ? bias.tangent.expand(sum.sizes()) : Tensor());
    if (of_sum.defined()) t = sum_of_defined(t, f.activation_second.call(sum, grad.value, of_sum));
    return {t, with_bias ? sum_to_row(t) : Tensor()};
  }
  static void save(const Family&, Saved& s, const std::tuple<Tensor, Tensor>&, const Tensor& grad,
                   const Tensor& x, const Tensor& bias, bool) {
    s.input(grad);
    s.input(x);
    s.input(bias);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const Family& f = *static_cast<const Family*>(c.op);
    const Tensor &dy = c.saved[kGrad], sum = at::add(c.saved[kInput], c.saved[kBias]);
    // What flows to dt flows to every row of dx. Where dt was not asked for it is no row.
    const bool of_row = grads.size() > 1 && grads[1].defined() && grads[1].sym_numel() != 0;
    const Tensor v = sum_of_defined(grads[0], of_row ? grads[1].expand(sum.sizes()) : Tensor());
    variable_list result(3);
    if (!v.defined()) return result;
    if (c.wants(kGrad)) result[kGrad] = f.activation_backward.call(sum, v);
    if (!c.wants(kInput) && !c.wants(kBias)) return result;
    result[kInput] = f.activation_second.call(sum, dy, v);
    if (c.wants(kBias)) result[kBias] = sum_to_row(result[kInput]);
    return result;
  }
};

// ------------------------------------------------------------------------------------------------
// registration

constinit std::vector<const Family*> families;  // by number; they live as long as the process

void define(torch::Library& m, size_t number, const FusedKernel& k) {
  auto& f = *new Family{number, k.name, k.broadcast, {}, {}, {}, {}, {}};
  families.push_back(&f);
  const std::string n = k.name, other = k.broadcast ? "Tensor bias" : "Tensor other";
  f.activation_backward =
      Op<Tensor(const Tensor&, const Tensor&)>::of(std::string(k.activation) + "_backward");
  f.activation_second = Op<Tensor(const Tensor&, const Tensor&, const Tensor&)>::of(
      std::string(k.activation) + "_second");
  Registration(m, f.forward, n, "(Tensor input, " + other + ") -> Tensor")
      .kernel(Forward{f})
      .derivative<ForwardDerivative>(f);
  Registration(m, f.inplace, n + "_", "(Tensor(a!) self, " + other + ") -> ()")
      .kernel(Inplace{f})
      .inplace_derivative<ForwardDerivative>(f);
  if (!k.broadcast) return;  // the backward of the activation will do
  Registration(m, f.backward, n + "_backward",
               "(Tensor grad, Tensor input, Tensor bias, bool with_bias=True) -> (Tensor, Tensor)")
      .kernel(Backward{f})
      .derivative<BackwardDerivative>(f);
}

}  // namespace

void register_fused(torch::Library& m) {
  size_t i = 0;
  for (const FusedKernel& k : table(c10::DeviceType::CPU)) define(m, i++, k);
}

void bind_fused(pybind11::module_& m) {
  for (const Family* f : families) {
    def(m, f->name,
        [f](const Tensor& input, const Tensor& other) { return f->forward.call(input, other); });
    def(m, std::string(f->name) + "_", [f](Tensor& self, const Tensor& other) {
      f->inplace.call(self, other);
      return self;
    });
  }
}

}  // namespace fastops
