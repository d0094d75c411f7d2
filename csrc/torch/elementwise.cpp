// Elementwise ops as torch sees them: for every kernel `name`, `name_`, `name_backward` and
// `name_second`, their schemas, checks and derivatives. No formula, no kernel by name.
#include <ATen/MemoryOverlap.h>

#include <array>

#include "../math.h"
#include "bind.h"
#include "layout.h"
#include "register.h"

namespace fastops {
namespace {

using at::Tensor;

const KernelTable<ElementwiseKernel>& table(c10::DeviceType device) {
  return tables(device).elementwise;
}

// The ops of a kernel with parameters P (all double).
template <class... P>
struct Family {
  size_t number;  // in the table
  const char* name;
  bool from_output;
  bool (*output_will_do)(const double* params);
  Op<Tensor(const Tensor&, P...)> forward;
  Op<void(Tensor&, P...)> inplace;
  Op<Tensor(const Tensor&, const Tensor&, P...)> backward;
  Op<Tensor(const Tensor&, const Tensor&, const Tensor&, P...)> second;
};

// ------------------------------------------------------------------------------------------------
// kernels

template <class... P>
void run(const Family<P...>& f, ElementwiseLauncher ElementwiseKernel::* kernel, const Tensor& out,
         std::initializer_list<const Tensor*> in, P... p) {
  if (out.numel() == 0) return;
  const c10::DeviceGuard guard(out.device());
  const ElementwiseKernel& k = table(out.device().type()).data[f.number];
  const double params[sizeof...(P) + 1] = {p...};
  ElementwiseArgs args{out.scalar_type(), out.numel(), out.mutable_data_ptr(), {}, params,
                       stream_of(out)};
  size_t i = 0;
  for (const Tensor* t : in) args.in[i++] = t->const_data_ptr();
  check(f.name, (k.*kernel)(args));
}

void check_same(const char* op, const Tensor& a, const Tensor& b) {
  TORCH_CHECK(
      a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() && a.device() == b.device(), op,
      ": expected tensors of one shape, dtype and device, got ", a.toString(), a.sizes(), " and ",
      b.toString(), b.sizes());
}

template <class... P>
struct Forward {
  const Family<P...>& f;
  Tensor operator()(const Tensor& input, P... p) const {
    check_dtype(f.name, input);
    if (input.is_non_overlapping_and_dense()) {
      Tensor y = output_like(input);
      run(f, &ElementwiseKernel::forward, y, {&input}, p...);
      return y;
    }
    const Tensor y = dense(input);
    run(f, &ElementwiseKernel::forward, y, {&y}, p...);
    return y;
  }
};

template <class... P>
struct Inplace {
  const Family<P...>& f;
  void operator()(Tensor& self, P... p) const {
    check_dtype(f.name, self);
    if (self.is_non_overlapping_and_dense())
      return run(f, &ElementwiseKernel::forward, self, {&self}, p...);
    at::assert_no_internal_overlap(self);
    const Tensor y = dense(self);
    run(f, &ElementwiseKernel::forward, y, {&y}, p...);
    self.copy_(y);
  }
};

template <class... P>
struct Backward {
  const Family<P...>& f;
  Tensor operator()(const Tensor& saved, const Tensor& grad, P... p) const {
    check_same(f.name, saved, grad);
    const Tensor s = dense(saved), dy = matching(grad, s);
    Tensor dx = output_like(s);
    run(f, &ElementwiseKernel::backward, dx, {&s, &dy}, p...);
    return dx;
  }
};

template <class... P>
struct Second {
  const Family<P...>& f;
  Tensor operator()(const Tensor& saved, const Tensor& grad, const Tensor& grad_grad,
                    P... p) const {
    check_same(f.name, saved, grad);
    check_same(f.name, saved, grad_grad);
    const Tensor s = dense(saved), dy = matching(grad, s), ddx = matching(grad_grad, s);
    Tensor ds = output_like(s);
    run(f, &ElementwiseKernel::second, ds, {&s, &dy, &ddx}, p...);
    return ds;
  }
};

// ------------------------------------------------------------------------------------------------
// derivatives

// f(family, parameters), of what a derivative has saved.
template <class... P, class F>
auto with_parameters(const BackwardContext& c, F f) {
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return f(*static_cast<const Family<P...>*>(c.op), c.values[I].toDouble()...);
  }(std::index_sequence_for<P...>{});
}

template <class... P>
struct ForwardDerivative {
  using Family = fastops::Family<P...>;
  static bool reads_input(const Family& f, P... p) {
    const double params[sizeof...(P) + 1] = {p...};
    return !f.from_output && !(f.output_will_do && f.output_will_do(params));
  }
  static Tensor jvp(const Family& f, const Tensor& y, const DualTensor& x, P... p) {
    return f.backward.call(f.from_output || !x.value.defined() ? y : x.value, x.tangent, p...);
  }
  static void save(const Family& f, Saved& s, const Tensor& y, const Tensor& x, P... p) {
    f.from_output || !x.defined() ? s.output(y) : s.input(x);
    s.value(p...);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    return with_parameters<P...>(c, [&](const Family& f, auto... p) {
      return variable_list{f.backward.call(c.saved[0], grads[0], p...)};
    });
  }
};

// Of backward(s, dy): to s by the second derivative, to dy by backward itself, which is linear in
// it.
template <class... P>
struct BackwardDerivative {
  using Family = fastops::Family<P...>;
  enum { kSaved, kGrad };
  static Tensor jvp(const Family& f, const Tensor&, const DualTensor& saved, const DualTensor& grad,
                    P... p) {
    Tensor t;
    if (grad.moves()) t = f.backward.call(saved.value, grad.tangent, p...);
    if (!saved.moves()) return t;
    return sum_of_defined(t, f.second.call(saved.value, grad.value, saved.tangent, p...));
  }
  static void save(const Family&, Saved& s, const Tensor&, const Tensor& saved, const Tensor& grad,
                   P... p) {
    s.input(saved);
    s.input(grad);
    s.value(p...);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    return with_parameters<P...>(c, [&](const Family& f, auto... p) {
      variable_list result(2);
      if (c.wants(kSaved))
        result[kSaved] = f.second.call(c.saved[kSaved], c.saved[kGrad], grads[0], p...);
      if (c.wants(kGrad)) result[kGrad] = f.backward.call(c.saved[kSaved], grads[0], p...);
      return result;
    });
  }
};

// ------------------------------------------------------------------------------------------------
// registration

// Calls f.operator()<double, ...>(number, kernel) with as many doubles as the kernel has
// parameters.
template <class F>
void each_kernel(F f) {
  size_t i = 0;
  for (const ElementwiseKernel& k : table(c10::DeviceType::CPU)) {
    switch (count_params(k.params)) {
      case 0:
        f.template operator()<>(i, k);
        break;
      case 1:
        f.template operator()<double>(i, k);
        break;
      case 2:
        f.template operator()<double, double>(i, k);
        break;
      case 3:
        f.template operator()<double, double, double>(i, k);
        break;
      default:
        TORCH_INTERNAL_ASSERT(false, "a formula with more than three parameters: ", k.name);
    }
    ++i;
  }
}

// By number; they live as long as the process.
constinit std::vector<const void*> families;

template <class... P>
void define(torch::Library& m, size_t number, const ElementwiseKernel& k) {
  auto& f = *new Family<P...>{number, k.name, k.from_output, k.output_will_do, {}, {}, {}, {}};
  families.push_back(&f);
  const std::string n = k.name, params = *k.params ? std::string(", ") + k.params : "";
  const std::vector<at::Tag> pointwise{at::Tag::pointwise};
  Registration(m, f.forward, n, "(Tensor input" + params + ") -> Tensor", pointwise)
      .kernel(Forward<P...>{f})
      .template derivative<ForwardDerivative<P...>>(f)
      .autocast_as(n);
  Registration(m, f.inplace, n + "_", "(Tensor(a!) self" + params + ") -> ()")
      .kernel(Inplace<P...>{f})
      .template inplace_derivative<ForwardDerivative<P...>>(f);
  Registration(m, f.backward, n + "_backward",
               "(Tensor saved, Tensor grad" + params + ") -> Tensor", pointwise)
      .kernel(Backward<P...>{f})
      .template derivative<BackwardDerivative<P...>>(f);
  Registration(m, f.second, n + "_second",
               "(Tensor saved, Tensor grad, Tensor grad_grad" + params + ") -> Tensor", pointwise)
      .kernel(Second<P...>{f})
      .not_differentiable();
}

template <class... P>
void bind(pybind11::module_& m, const Family<P...>& f) {
  def(m, f.name, [&f](const Tensor& input, P... p) { return f.forward.call(input, p...); });
  def(m, std::string(f.name) + "_", [&f](Tensor& self, P... p) {
    f.inplace.call(self, p...);
    return self;
  });
}

}  // namespace

void register_elementwise(torch::Library& m) {
  each_kernel([&]<class... P>(size_t i, const ElementwiseKernel& k) { define<P...>(m, i, k); });
}

void bind_elementwise(pybind11::module_& m) {
  each_kernel([&]<class... P>(size_t i, const ElementwiseKernel&) {
    bind(m, *static_cast<const Family<P...>*>(families[i]));
  });
  // What backward takes: the output (true) or the input.
  m.def("from_output", [](const std::string& name) {
    for (const ElementwiseKernel& k : table(c10::DeviceType::CPU))
      if (name == k.name) return k.from_output;
    throw pybind11::key_error("no elementwise op '" + name + "'");
  });
}

}  // namespace fastops
