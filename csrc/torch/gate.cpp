// Gated linear units as torch sees them. For every kernel `name` of two tensors, and `name_packed`
// of one whose halves along a dimension they are; `_backward`, `_tangent` and `_second` of each.
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/add.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>

#include "bind.h"
#include "layout.h"
#include "register.h"

namespace fastops {
namespace {

using at::Tensor;
using Pair = std::tuple<Tensor, Tensor>;

const KernelTable<GateKernel>& table(c10::DeviceType device) { return tables(device).gate; }

// y = f(a, b), and with f_a, f_b the slopes there:
struct Family {
  size_t number;  // in the table
  const char* name;
  Op<Tensor(const Tensor&, const Tensor&)> forward;                // (a, b) -> y
  Op<Pair(const Tensor&, const Tensor&, const Tensor&)> backward;  // (a, b, dy) -> dy f_a, dy f_b
  // (a, b, u, v) -> u f_a + v f_b
  Op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)> tangent;
  // (a, b, dy, u, v) -> the derivatives to a and b of dy times that
  Op<Pair(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)> second;
};
// The same of x, of which a and b are halves, and of w, of which u and v are.
struct PackedFamily {
  size_t number;
  const char* name;
  Op<Tensor(const Tensor&, int64_t)> forward;                               // (x, dim)
  Op<Tensor(const Tensor&, const Tensor&, int64_t)> backward;               // (x, dy, dim)
  Op<Tensor(const Tensor&, const Tensor&, int64_t)> tangent;                // (x, w, dim)
  Op<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t)> second;  // (x, dy, w, dim)
};

// ------------------------------------------------------------------------------------------------
// kernels

// Tensors as a kernel walks them: `outer` rows of `inner` elements.
class GateCall {
 public:
  GateCall(const Tensor& like, int64_t outer, int64_t inner) {
    a_.dtype = like.scalar_type();
    a_.outer = outer;
    a_.inner = inner;
    a_.stream = stream_of(like);
  }
  GateCall& in(const Tensor& t, int64_t stride, int64_t offset = 0) {
    auto* data = static_cast<const char*>(t.const_data_ptr()) + offset * t.element_size();
    a_.in[inputs_++] = {const_cast<char*>(data), stride};
    return *this;
  }
  GateCall& out(const Tensor& t, int64_t stride, int64_t offset = 0) {
    auto* data = static_cast<char*>(t.mutable_data_ptr()) + offset * t.element_size();
    a_.out[outputs_++] = {data, stride};
    return *this;
  }
  void run(const char* name, size_t number, GateLauncher GateKernel::* kernel,
           const Tensor& like) const {
    const c10::DeviceGuard guard(like.device());
    check(name, (table(like.device().type()).data[number].*kernel)(a_));
  }

 private:
  GateArgs a_{};
  size_t inputs_ = 0, outputs_ = 0;
};

void check_alike(const char* name, const Tensor& a, const Tensor& b) {
  TORCH_CHECK(
      a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() && a.device() == b.device(),
      name, ": expected tensors of one shape, dtype and device, got ", a.toString(), a.sizes(),
      " and ", b.toString(), b.sizes());
}

// How far apart the rows of t's last dimension are, where that is all that a walk over them has to
// know, as of a half of a contiguous tensor; else nothing.
std::optional<int64_t> row_stride(const Tensor& t) {
  if (t.dim() == 0 || (t.size(-1) != 1 && t.stride(-1) != 1)) return std::nullopt;
  int64_t stride = t.size(-1), expected = 0;
  for (int64_t d = t.dim() - 2; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (expected == 0) {
      stride = t.stride(d);
      if (stride < t.size(-1)) return std::nullopt;
    } else if (t.stride(d) != expected) {
      return std::nullopt;
    }
    expected = t.stride(d) * t.size(d);
  }
  return stride;
}

// Of two tensors: runs a kernel on `given`, of one shape, and returns its N results.
template <size_t N>
std::array<Tensor, N> run(const Family& f, GateLauncher GateKernel::* kernel,
                          std::initializer_list<const Tensor*> given) {
  const Tensor& first = **given.begin();
  check_dtype(f.name, first);
  bool flat = first.is_non_overlapping_and_dense();
  for (const Tensor* t : given) {
    check_alike(f.name, first, *t);
    flat = flat && same_order(*t, first);
  }
  const int64_t inner = flat || first.dim() == 0 ? first.numel() : first.size(-1);
  std::array<Tensor, N> results;
  for (Tensor& t : results)
    t = flat ? output_like(first) : output_beside(first, first.sizes(), first.scalar_type());
  if (first.numel() == 0) return results;
  GateCall call(first, first.numel() / inner, inner);
  c10::SmallVector<Tensor, 5> held;
  for (const Tensor* t : given) {
    const auto stride = flat ? std::optional(inner) : row_stride(*t);
    held.push_back(stride ? *t : t->contiguous());
    call.in(held.back(), stride.value_or(inner));
  }
  for (const Tensor& t : results) call.out(t, inner);
  call.run(f.name, f.number, kernel, first);
  return results;
}

struct Forward {
  const Family& f;
  Tensor operator()(const Tensor& a, const Tensor& b) const {
    return run<1>(f, &GateKernel::forward, {&a, &b})[0];
  }
};
struct Backward {
  const Family& f;
  Pair operator()(const Tensor& a, const Tensor& b, const Tensor& dy) const {
    auto [da, db] = run<2>(f, &GateKernel::backward, {&a, &b, &dy});
    return {da, db};
  }
};
struct Tangent {
  const Family& f;
  Tensor operator()(const Tensor& a, const Tensor& b, const Tensor& u, const Tensor& v) const {
    return run<1>(f, &GateKernel::tangent, {&a, &b, &u, &v})[0];
  }
};
struct Second {
  const Family& f;
  Pair operator()(const Tensor& a, const Tensor& b, const Tensor& dy, const Tensor& u,
                  const Tensor& v) const {
    auto [ha, hb] = run<2>(f, &GateKernel::second, {&a, &b, &dy, &u, &v});
    return {ha, hb};
  }
};

// The halves of a dense tensor along a dimension, and the layout of what is as large as one.
struct Halves {
  Tensor x;
  int64_t outer, inner;  // of one half
  c10::SmallVector<int64_t, 8> sizes, strides;

  Halves(const char* name, const Tensor& input, int64_t dim) {
    check_dtype(name, input);
    TORCH_CHECK(input.dim() > 0, name, " does not support 0-dimensional tensors");
    const int64_t d = at::maybe_wrap_dim(dim, input.dim()), n = input.size(d);
    TORCH_CHECK(n % 2 == 0, name, ": Halving dimension must be even, but dimension ", d,
                " is size ", n);
    x = dense(input);
    const Rows3 rows = around(x, d);
    outer = rows.outer;
    inner = rows.n / 2 * rows.inner;
    sizes.append(x.sizes().begin(), x.sizes().end());
    sizes[d] /= 2;
    for (const int64_t s : x.strides()) strides.push_back(s >= 2 * inner && inner ? s / 2 : s);
    strides[d] = x.stride(d);
  }
  bool empty() const { return x.numel() == 0; }
  Tensor output() const { return output_strided(x, sizes, strides); }
  // A tensor as large as a half, in its memory order.
  Tensor like_half(const char* name, const Tensor& t) const {
    TORCH_CHECK(t.sizes() == at::IntArrayRef(sizes) && t.scalar_type() == x.scalar_type() &&
                    t.device() == x.device(),
                name, ": expected a grad of size ", at::IntArrayRef(sizes), " and dtype ",
                x.scalar_type(), ", got ", t.toString(), t.sizes());
    return empty() ? t : matching(t, output_meta());
  }
  Tensor like_whole(const char* name, const Tensor& t) const {
    check_alike(name, x, t);
    return matching(t, x);
  }
  GateCall call() const {
    return GateCall(x, outer, inner).in(x, 2 * inner).in(x, 2 * inner, inner);
  }

 private:
  // Without memory, for its strides.
  Tensor output_meta() const { return x.as_strided(sizes, strides); }
};

struct PackedForward {
  const PackedFamily& f;
  Tensor operator()(const Tensor& input, int64_t dim) const {
    const Halves h(f.name, input, dim);
    Tensor y = h.output();
    if (!h.empty()) h.call().out(y, h.inner).run(f.name, f.number, &GateKernel::forward, h.x);
    return y;
  }
};
struct PackedBackward {
  const PackedFamily& f;
  Tensor operator()(const Tensor& input, const Tensor& grad, int64_t dim) const {
    const Halves h(f.name, input, dim);
    const Tensor dy = h.like_half(f.name, grad);
    Tensor dx = output_like(h.x);
    if (!h.empty())
      h.call()
          .in(dy, h.inner)
          .out(dx, 2 * h.inner)
          .out(dx, 2 * h.inner, h.inner)
          .run(f.name, f.number, &GateKernel::backward, h.x);
    return dx;
  }
};
struct PackedTangent {
  const PackedFamily& f;
  Tensor operator()(const Tensor& input, const Tensor& along, int64_t dim) const {
    const Halves h(f.name, input, dim);
    const Tensor w = h.like_whole(f.name, along);
    Tensor t = h.output();
    if (!h.empty())
      h.call()
          .in(w, 2 * h.inner)
          .in(w, 2 * h.inner, h.inner)
          .out(t, h.inner)
          .run(f.name, f.number, &GateKernel::tangent, h.x);
    return t;
  }
};
struct PackedSecond {
  const PackedFamily& f;
  Tensor operator()(const Tensor& input, const Tensor& grad, const Tensor& along,
                    int64_t dim) const {
    const Halves h(f.name, input, dim);
    const Tensor dy = h.like_half(f.name, grad), w = h.like_whole(f.name, along);
    Tensor dx = output_like(h.x);
    if (!h.empty())
      h.call()
          .in(dy, h.inner)
          .in(w, 2 * h.inner)
          .in(w, 2 * h.inner, h.inner)
          .out(dx, 2 * h.inner)
          .out(dx, 2 * h.inner, h.inner)
          .run(f.name, f.number, &GateKernel::second, h.x);
    return dx;
  }
};

// ------------------------------------------------------------------------------------------------
// derivatives

Tensor or_zeros(const Tensor& t, const Tensor& like) {
  return t.defined() ? t : at::zeros_like(like);
}
Pair sums_of_defined(const Pair& p, const Pair& q) {
  return {sum_of_defined(std::get<0>(p), std::get<0>(q)),
          sum_of_defined(std::get<1>(p), std::get<1>(q))};
}

enum { kA, kB, kGrad };

struct ForwardDerivative {
  using Family = fastops::Family;
  static Tensor jvp(const Family& f, const Tensor&, const DualTensor& a, const DualTensor& b) {
    return f.tangent.call(a.value, b.value, or_zeros(a.tangent, a.value),
                          or_zeros(b.tangent, b.value));
  }
  static void save(const Family&, Saved& s, const Tensor&, const Tensor& a, const Tensor& b) {
    s.input(a);
    s.input(b);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const auto [da, db] =
        static_cast<const Family*>(c.op)->backward.call(c.saved[kA], c.saved[kB], grads[0]);
    return {da, db};
  }
};

// Linear in dy, where the transpose is the tangent; the Hessian is symmetric.
struct BackwardDerivative {
  using Family = fastops::Family;
  static Pair jvp(const Family& f, const Pair&, const DualTensor& a, const DualTensor& b,
                  const DualTensor& grad) {
    Pair t;
    if (grad.moves()) t = f.backward.call(a.value, b.value, grad.tangent);
    if (!a.moves() && !b.moves()) return t;
    return sums_of_defined(t,
                           f.second.call(a.value, b.value, grad.value, or_zeros(a.tangent, a.value),
                                         or_zeros(b.tangent, b.value)));
  }
  static void save(const Family&, Saved& s, const Pair&, const Tensor& a, const Tensor& b,
                   const Tensor& grad) {
    for (const Tensor* t : {&a, &b, &grad}) s.input(*t);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const Family& f = *static_cast<const Family*>(c.op);
    const Tensor &a = c.saved[kA], &b = c.saved[kB];
    const Tensor u = or_zeros(grads[0], a), v = or_zeros(grads[1], b);
    variable_list result(3);
    if (c.wants(kA) || c.wants(kB))
      std::tie(result[kA], result[kB]) = f.second.call(a, b, c.saved[kGrad], u, v);
    if (c.wants(kGrad)) result[kGrad] = f.tangent.call(a, b, u, v);
    return result;
  }
};

// Linear in (u, v), where the transpose is backward.
struct TangentDerivative {
  using Family = fastops::Family;
  enum { kU = 2, kV };
  static Tensor jvp(const Family& f, const Tensor& y, const DualTensor& a, const DualTensor& b,
                    const DualTensor& u, const DualTensor& v) {
    Tensor t;
    if (u.moves() || v.moves())
      t = f.tangent.call(a.value, b.value, or_zeros(u.tangent, u.value),
                         or_zeros(v.tangent, v.value));
    if (!a.moves() && !b.moves()) return t;
    const auto [ha, hb] = f.second.call(a.value, b.value, at::ones_like(y), u.value, v.value);
    if (a.moves()) t = sum_of_defined(t, at::mul(ha, a.tangent));
    if (b.moves()) t = sum_of_defined(t, at::mul(hb, b.tangent));
    return t;
  }
  static void save(const Family&, Saved& s, const Tensor&, const Tensor& a, const Tensor& b,
                   const Tensor& u, const Tensor& v) {
    for (const Tensor* t : {&a, &b, &u, &v}) s.input(*t);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const Family& f = *static_cast<const Family*>(c.op);
    const Tensor &a = c.saved[kA], &b = c.saved[kB];
    variable_list result(4);
    if (c.wants(kA) || c.wants(kB))
      std::tie(result[kA], result[kB]) = f.second.call(a, b, grads[0], c.saved[kU], c.saved[kV]);
    if (c.wants(kU) || c.wants(kV))
      std::tie(result[kU], result[kV]) = f.backward.call(a, b, grads[0]);
    return result;
  }
};

// The same of one tensor.
struct PackedForwardDerivative {
  using Family = PackedFamily;
  static Tensor jvp(const Family& f, const Tensor&, const DualTensor& x, int64_t dim) {
    return f.tangent.call(x.value, x.tangent, dim);
  }
  static void save(const Family&, Saved& s, const Tensor&, const Tensor& x, int64_t dim) {
    s.input(x);
    s.value(dim);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    return {
        static_cast<const Family*>(c.op)->backward.call(c.saved[0], grads[0], c.values[0].toInt())};
  }
};

struct PackedBackwardDerivative {
  using Family = PackedFamily;
  enum { kX, kDy };
  static Tensor jvp(const Family& f, const Tensor&, const DualTensor& x, const DualTensor& grad,
                    int64_t dim) {
    Tensor t;
    if (grad.moves()) t = f.backward.call(x.value, grad.tangent, dim);
    if (!x.moves()) return t;
    return sum_of_defined(t, f.second.call(x.value, grad.value, x.tangent, dim));
  }
  static void save(const Family&, Saved& s, const Tensor&, const Tensor& x, const Tensor& grad,
                   int64_t dim) {
    s.input(x);
    s.input(grad);
    s.value(dim);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const Family& f = *static_cast<const Family*>(c.op);
    const int64_t dim = c.values[0].toInt();
    variable_list result(2);
    if (c.wants(kX)) result[kX] = f.second.call(c.saved[kX], c.saved[kDy], grads[0], dim);
    if (c.wants(kDy)) result[kDy] = f.tangent.call(c.saved[kX], grads[0], dim);
    return result;
  }
};

struct PackedTangentDerivative {
  using Family = PackedFamily;
  enum { kX, kAlong };
  static Tensor jvp(const Family& f, const Tensor& y, const DualTensor& x, const DualTensor& w,
                    int64_t dim) {
    Tensor t;
    if (w.moves()) t = f.tangent.call(x.value, w.tangent, dim);
    if (!x.moves()) return t;
    const Tensor h = at::mul(f.second.call(x.value, at::ones_like(y), w.value, dim), x.tangent);
    const auto halves = h.chunk(2, dim);
    return sum_of_defined(t, at::add(halves[0], halves[1]));
  }
  static void save(const Family&, Saved& s, const Tensor&, const Tensor& x, const Tensor& w,
                   int64_t dim) {
    s.input(x);
    s.input(w);
    s.value(dim);
  }
  static variable_list vjp(const variable_list& grads, const BackwardContext& c) {
    const Family& f = *static_cast<const Family*>(c.op);
    const int64_t dim = c.values[0].toInt();
    variable_list result(2);
    if (c.wants(kX)) result[kX] = f.second.call(c.saved[kX], grads[0], c.saved[kAlong], dim);
    if (c.wants(kAlong)) result[kAlong] = f.backward.call(c.saved[kX], grads[0], dim);
    return result;
  }
};

// ------------------------------------------------------------------------------------------------
// registration

// By number; they live as long as the process.
constinit std::vector<const Family*> families;
constinit std::vector<const PackedFamily*> packed_families;

void define(torch::Library& m, size_t number, const GateKernel& k) {
  auto& f = *new Family{number, k.name, {}, {}, {}, {}};
  families.push_back(&f);
  const std::string n = k.name;
  const std::vector<at::Tag> pointwise{at::Tag::pointwise};
  Registration(m, f.forward, n, "(Tensor a, Tensor b) -> Tensor", pointwise)
      .kernel(Forward{f})
      .derivative<ForwardDerivative>(f);
  Registration(m, f.backward, n + "_backward",
               "(Tensor a, Tensor b, Tensor grad) -> (Tensor, Tensor)", pointwise)
      .kernel(Backward{f})
      .derivative<BackwardDerivative>(f);
  Registration(m, f.tangent, n + "_tangent", "(Tensor a, Tensor b, Tensor u, Tensor v) -> Tensor",
               pointwise)
      .kernel(Tangent{f})
      .derivative<TangentDerivative>(f);
  Registration(m, f.second, n + "_second",
               "(Tensor a, Tensor b, Tensor grad, Tensor u, Tensor v) -> (Tensor, Tensor)",
               pointwise)
      .kernel(Second{f})
      .not_differentiable();
}

void define_packed(torch::Library& m, size_t number, const GateKernel& k) {
  auto& f = *new PackedFamily{number, k.name, {}, {}, {}, {}};
  packed_families.push_back(&f);
  const std::string n = std::string(k.name) + "_packed";
  Registration(m, f.forward, n, "(Tensor input, int dim=-1) -> Tensor")
      .kernel(PackedForward{f})
      .derivative<PackedForwardDerivative>(f);
  Registration(m, f.backward, n + "_backward", "(Tensor input, Tensor grad, int dim) -> Tensor")
      .kernel(PackedBackward{f})
      .derivative<PackedBackwardDerivative>(f);
  Registration(m, f.tangent, n + "_tangent", "(Tensor input, Tensor along, int dim) -> Tensor")
      .kernel(PackedTangent{f})
      .derivative<PackedTangentDerivative>(f);
  Registration(m, f.second, n + "_second",
               "(Tensor input, Tensor grad, Tensor along, int dim) -> Tensor")
      .kernel(PackedSecond{f})
      .not_differentiable();
}

}  // namespace

void register_gates(torch::Library& m) {
  size_t i = 0;
  for (const GateKernel& k : table(c10::DeviceType::CPU)) {
    define(m, i, k);
    define_packed(m, i++, k);
  }
}

void bind_gates(pybind11::module_& m) {
  for (const Family* f : families)
    def(m, f->name, [f](const Tensor& a, const Tensor& b) { return f->forward.call(a, b); });
  for (const PackedFamily* f : packed_families)
    def(m, std::string(f->name) + "_packed",
        [f](const Tensor& input, int64_t dim) { return f->forward.call(input, dim); });
}

}  // namespace fastops
