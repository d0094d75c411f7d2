// Softmax and log-softmax as torch sees them: schemas, checks and derivatives.
#include <ATen/WrapDimUtils.h>

#include "bind.h"
#include "layout.h"
#include "register.h"

namespace fastops {
namespace {

using at::Tensor;

const KernelTable<SoftmaxKernel>& table(c10::DeviceType device) { return tables(device).softmax; }

struct Family {
  size_t number;  // in the table
  const char* name;
  bool is_log;
  Op<Tensor(const Tensor&, int64_t)> forward;
  Op<Tensor(const Tensor&, const Tensor&, int64_t)> backward;  // (grad, output, dim)
};

// ------------------------------------------------------------------------------------------------
// kernels

SoftmaxArgs arguments_of(const Tensor& x, int64_t dim) {
  const Rows3 r = around(x, dim);
  return {x.scalar_type(), r.outer, r.n, r.inner, nullptr, {}, stream_of(x)};
}

struct Forward {
  const Family& f;
  Tensor operator()(const Tensor& input, int64_t dim) const {
    check_dtype(f.name, input);
    const int64_t d = at::maybe_wrap_dim(dim, input.dim());
    const Tensor x = dense(input);
    Tensor y = x.is_same(input) ? output_like(x) : x;
    if (x.numel() == 0) return y;
    const c10::DeviceGuard guard(x.device());
    SoftmaxArgs a = arguments_of(x, d);
    a.out = y.mutable_data_ptr();
    a.in[0] = x.const_data_ptr();
    check(f.name, table(x.device().type()).data[f.number].forward(a));
    return y;
  }
};

struct Backward {
  const Family& f;
  Tensor operator()(const Tensor& grad, const Tensor& output, int64_t dim) const {
    TORCH_CHECK(grad.sizes() == output.sizes() && grad.scalar_type() == output.scalar_type() &&
                    grad.device() == output.device(),
                f.name, "_backward: expected grad like output ", output.toString(), output.sizes(),
                ", got ", grad.toString(), grad.sizes());
    check_dtype(f.name, output);
    const int64_t d = at::maybe_wrap_dim(dim, output.dim());
    const Tensor y = dense(output), dy = matching(grad, y);
    Tensor dx = output_like(y);
    if (y.numel() == 0) return dx;
    const c10::DeviceGuard guard(y.device());
    SoftmaxArgs a = arguments_of(y, d);
    a.out = dx.mutable_data_ptr();
    a.in[0] = y.const_data_ptr();
    a.in[1] = dy.const_data_ptr();
    check(f.name, table(y.device().type()).data[f.number].backward(a));
    return dx;
  }
};

// ------------------------------------------------------------------------------------------------
// derivatives

struct ForwardDerivative {
  using Family = fastops::Family;
  // softmax's Jacobian is symmetric, log-softmax's is not
  static Tensor jvp(const Family& f, const Tensor& y, const DualTensor& x, int64_t dim) {
    const Tensor& t = x.tangent;
    return f.is_log ? t - (t * y.exp()).sum(dim, true) : f.backward.call(t, y, dim);
  }
  static void save(const Family&, Saved& s, const Tensor& y, const Tensor&, int64_t dim) {
    s.output(y);
    s.value(dim);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    return {
        static_cast<const Family*>(c.op)->backward.call(grads[0], c.saved[0], c.values[0].toInt())};
  }
};

// Of backward(dy, y): in torch ops, so that it can be differentiated without end.
struct BackwardDerivative {
  using Family = fastops::Family;
  enum { kGrad, kOutput };
  static Tensor jvp(const Family& f, const Tensor&, const DualTensor& grad,
                    const DualTensor& output, int64_t dim) {
    const Tensor &dy = grad.value, &y = output.value, &ty = output.tangent;
    Tensor t;
    if (grad.moves()) t = f.backward.call(grad.tangent, y, dim);
    if (!output.moves()) return t;
    return sum_of_defined(
        t, f.is_log ? -(y.exp() * ty * dy.sum(dim, true))
                    : ty * (dy - (y * dy).sum(dim, true)) - y * (ty * dy).sum(dim, true));
  }
  static void save(const Family&, Saved& s, const Tensor&, const Tensor& grad, const Tensor& output,
                   int64_t dim) {
    s.input(grad);
    s.input(output);
    s.value(dim);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const bool log = static_cast<const Family*>(c.op)->is_log;
    const Tensor &v = grads[0], &dy = c.saved[kGrad], &y = c.saved[kOutput];
    const int64_t dim = c.values[0].toInt();
    variable_list result(2);
    if (c.wants(kGrad))
      result[kGrad] = log ? v - (v * y.exp()).sum(dim, true) : y * (v - (y * v).sum(dim, true));
    if (c.wants(kOutput))
      result[kOutput] = log ? -(v * y.exp() * dy.sum(dim, true))
                            : v * (dy - (y * dy).sum(dim, true)) - dy * (v * y).sum(dim, true);
    return result;
  }
};

// ------------------------------------------------------------------------------------------------
// registration

constinit std::vector<const Family*> families;  // by number; they live as long as the process

void define(torch::Library& m, size_t number, const SoftmaxKernel& k) {
  auto& f = *new Family{number, k.name, k.is_log, {}, {}};
  families.push_back(&f);
  const std::string n = k.name;
  Registration(m, f.forward, n, "(Tensor input, int dim) -> Tensor")
      .kernel(Forward{f})
      .derivative<ForwardDerivative>(f)
      .autocast_as(n, "int");
  Registration(m, f.backward, n + "_backward", "(Tensor grad, Tensor output, int dim) -> Tensor")
      .kernel(Backward{f})
      .derivative<BackwardDerivative>(f);
}

}  // namespace

void register_softmax(torch::Library& m) {
  size_t i = 0;
  for (const SoftmaxKernel& k : table(c10::DeviceType::CPU)) define(m, i++, k);
}

void bind_softmax(pybind11::module_& m) {
  for (const Family* f : families)
    def(m, f->name, [f](const Tensor& input, int64_t dim) { return f->forward.call(input, dim); });
}

}  // namespace fastops
