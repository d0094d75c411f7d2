#include "multi_tensor_step.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <pybind11/gil.h>

#include <algorithm>

#include "../backend.h"
#include "tensor_impl.h"

namespace fastops {

using at::Tensor;
using c10::DispatchKey;
using c10::TensorImpl;

namespace {

// Below this many elements a step is over before another thread could have used the interpreter.
constexpr int64_t kReleaseInterpreter = 1 << 17;

const KernelTable<OptimizerKernel>& kernels() {
  static const KernelTable<OptimizerKernel> table = tables(c10::DeviceType::CPU).optimizer;
  return table;
}

bool equal(c10::IntArrayRef a, c10::IntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t d = 0; d < a.size(); ++d)
    if (a[d] != b[d]) return false;
  return true;
}

}  // namespace

// ------------------------------------------------------------------------------------------------
// collecting

void MultiTensorStep::clear() {
  std::swap(entries_, before_);
  entries_.clear();
  copies_.clear();
  elements_ = 0;
  all_flat_ = true;
}

void MultiTensorStep::add(const StepOptions& options, uint32_t number, bool first,
                          const StepTensors& tensors, double weight) {
  const OptimizerKernel& kernel = kernels().data[options.kernel];
  TensorImpl *const p = tensors.p, *const g = tensors.g;
  Entry& e = entries_.emplace_back(Entry{.t = tensors,
                                         .options = &options,
                                         .number = number,
                                         .n = p->numel(),
                                         .dtype = dtype_of(p),
                                         .state_dtype = dtype_of(p),
                                         .device = p->device(),
                                         .first = first,
                                         .weight = weight});
  const size_t index = entries_.size() - 1;
  // A complex number is a pair of real ones to every formula, as in torch.
  if (c10::isComplexType(e.dtype)) {
    e.n *= 2;
    e.dtype = e.state_dtype = c10::toRealValueType(e.dtype);
  }
  const bool reduced = e.dtype == c10::kHalf || e.dtype == c10::kBFloat16;
  TORCH_CHECK_NOT_IMPLEMENTED(e.dtype == c10::kFloat || e.dtype == c10::kDouble || reduced,
                              kernel.name, ": parameter ", index, " is ", dtype_of(p),
                              "; the optimizers take floating point and complex parameters");
  const bool dense = p->is_non_overlapping_and_dense();
  e.flat = dense && !is_lazy(p);
  check_writable("parameter", p, e);
  if (!dense) at::assert_no_internal_overlap(p);

  check_like_parameter("the gradient", g, e);
  TORCH_CHECK(g->dtype() == p->dtype(), kernel.name, ": parameter ", index, " is ", dtype_of(p),
              " but its gradient is ", dtype_of(g),
              "; give it a gradient of the parameter's dtype");
  e.flat = e.flat && same_memory_order(p, g) && !is_lazy(g);

  const auto check_order = [&](TensorImpl* t) {
    if (dense && same_memory_order(p, t) && !is_lazy(t)) return;
    e.flat = false;
    if (!t->is_non_overlapping_and_dense()) at::assert_no_internal_overlap(t);
  };
  for (int k = 0; k < kernel.states; ++k) {
    TensorImpl *const s = tensors.states[k], *const first_of_them = tensors.states[0];
    check_writable("state", s, e);
    check_like_parameter("a state", s, e);
    TORCH_CHECK(s->dtype() == first_of_them->dtype(), kernel.name, ": the states of parameter ",
                index, " are ", dtype_of(first_of_them), " and ", dtype_of(s),
                "; they must be of one dtype");
    check_order(s);
  }
  if (TensorImpl* const average = tensors.average) {
    const auto wanted = reduced ? c10::kFloat : dtype_of(p);
    check_writable("average", average, e);
    check_like_parameter("its average", average, e);
    TORCH_CHECK(dtype_of(average) == wanted, kernel.name, ": the average of parameter ", index,
                " is ", dtype_of(average), "; of ", dtype_of(p), " parameters it must be ", wanted);
    check_order(average);
  }
  if (kernel.states > 0 && tensors.states[0]->dtype() != p->dtype()) {
    e.state_dtype = dtype_of(tensors.states[0]);
    TORCH_CHECK((reduced && e.state_dtype == c10::kFloat) ||
                    (dtype_of(p) == c10::kFloat && e.state_dtype == c10::kBFloat16),
                kernel.name, ": parameter ", index, " is ", dtype_of(p), " but its states are ",
                e.state_dtype);
  }
  TORCH_CHECK(!options.stochastic || (e.dtype != c10::kHalf && e.state_dtype != c10::kHalf),
              kernel.name, ": parameter ", index,
              " is Half; rounding=\"stochastic\" is for BFloat16");
  if (kernel.scalar_states > 0) check_scalar_states(e);
  e.on_device =
      (kernel.scalar_states > 0 && !tensors.scalar_states[0]->is_cpu()) || !options.memory.empty();
  e.g_is_alone = g->unsafe_storage().unique();
  e.find_memory();
  elements_ += e.n;
  all_flat_ = all_flat_ && e.flat;
}

void MultiTensorStep::check_writable(const char* what, const TensorImpl* t, const Entry& e) const {
  TORCH_CHECK(t->key_set().has(DispatchKey::ADInplaceOrView) || c10::InferenceMode::is_enabled(),
              kernels().data[e.options->kernel].name, ": the ", what, " of parameter ",
              entries_.size() - 1,
              " is an inference tensor. Inplace update to inference tensor outside InferenceMode "
              "is not allowed");
}

void MultiTensorStep::check_like_parameter(const char* what, const TensorImpl* t,
                                           const Entry& e) const {
  const char* name = kernels().data[e.options->kernel].name;
  TORCH_CHECK(equal(t->sizes(), e.t.p->sizes()), name, ": parameter ", entries_.size() - 1,
              " has shape ", e.t.p->sizes(), " but ", what, " has shape ", t->sizes());
  TORCH_CHECK(t->device() == e.t.p->device(), name, ": parameter ", entries_.size() - 1, " is on ",
              e.t.p->device(), " but ", what, " is on ", t->device());
}

void MultiTensorStep::check_scalar_states(Entry& e) const {
  const OptimizerKernel& kernel = kernels().data[e.options->kernel];
  const c10::Device device = e.t.scalar_states[0]->device();
  for (int k = 0; k < kernel.scalar_states; ++k) {
    TensorImpl* const t = e.t.scalar_states[k];
    check_writable("step count", t, e);
    TORCH_CHECK(t->numel() == 1 && (t->is_cpu() || t->device() == e.device) &&
                    t->device() == device &&
                    (dtype_of(t) == c10::kFloat || dtype_of(t) == c10::kDouble),
                kernel.name, ": the ", k == 0 ? "step count" : "numbers beside the step count",
                " must be one float32 or float64 on the CPU or where its parameter is");
    e.scalar_data[k] = t->mutable_data();
    if (dtype_of(t) == c10::kDouble) e.in_double |= 1u << k;
  }
}

void MultiTensorStep::Entry::find_memory() {
  p_data = t.p->mutable_data();
  g_data = t.g->data();
  for (int k = 0; k < kMaxStates && t.states[k]; ++k) s_data[k] = t.states[k]->mutable_data();
  if (t.average) average_data = t.average->mutable_data();
}

void MultiTensorStep::expect(size_t k) const {
  if (k >= before_.size()) return;
  const Entry& e = before_[k];
  prefetch(e.t.p);
  prefetch(e.t.g);
  e.each_scalar_state([](int, TensorImpl* t, void*) { prefetch(t); });
  e.each_state([](TensorImpl* t, void*) { prefetch(t); });
}

// ------------------------------------------------------------------------------------------------
// other threads

MultiTensorStep::Ownership::Ownership(MultiTensorStep& step) : step_(step) {
  if (!step_.releases_interpreter_) return;
  const auto own = [&](TensorImpl* t) {
    step_.owned_.push_back(tensor_of(t));
    step_.owned_memory_.push_back(t->storage());  // a tensor can get another: p.data = ...
  };
  for (const Entry& e : step_.entries_) {
    own(e.t.p);
    own(e.t.g);
    e.each_scalar_state([&](int, TensorImpl* t, void*) { own(t); });
    e.each_state([&](TensorImpl* t, void*) { own(t); });
  }
}

MultiTensorStep::Ownership::~Ownership() {
  step_.releases_interpreter_ = false;
  step_.owned_.clear();
  step_.owned_memory_.clear();
}

MultiTensorStep::Ownership MultiTensorStep::share_interpreter() {
  releases_interpreter_ = elements_ > kReleaseInterpreter && all_flat_ && !overlapping();
  return Ownership(*this);
}

// ------------------------------------------------------------------------------------------------
// the norm

Tensor MultiTensorStep::clip(const std::optional<Tensor>& grad_scale, double max_norm) {
  norm_.clear();
  const c10::Device device = entries_[0].device;
  if (grad_scale && grad_scale->device() != device) return {};
  for (const Entry& e : entries_) {
    if (e.device != device || is_lazy(e.t.g) || !e.t.g->is_non_overlapping_and_dense()) return {};
    norm_.add(e.dtype, e.n, e.g_data);
  }
  return norm_.clip(device, grad_scale, max_norm, releases_interpreter_);
}

// ------------------------------------------------------------------------------------------------
// overlap

// Whether two of the tensors written, or one written and one gradient, share memory. The answer
// stands as long as the pointers do; a gradient that is alone on its storage shares it with
// nobody.
bool MultiTensorStep::overlapping() {
  bool same = true;
  size_t k = 0;
  const auto see = [&](const Entry& e, const TensorImpl* t, void* data) {
    const char* begin = static_cast<const char*>(data);
    const int64_t bytes = e.flat ? t->numel() * static_cast<int64_t>(t->itemsize()) : extent(t);
    if (k == written_.size()) written_.push_back({nullptr, 0});
    if (written_[k].begin != begin || written_[k].bytes != bytes) {
      written_[k] = {begin, bytes};
      same = false;
    }
    ++k;
  };
  for (const Entry& e : entries_) {
    see(e, e.t.p, e.p_data);
    e.each_state([&](const TensorImpl* t, void* data) { see(e, t, data); });
    if (e.on_device)
      e.each_scalar_state([&](int, const TensorImpl* t, void* data) { see(e, t, data); });
  }
  if (k != written_.size()) {
    written_.resize(k);
    same = false;
  }
  if (!same) {
    sorted_ = written_;
    std::sort(sorted_.begin(), sorted_.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    overlapping_ = false;
    const char* end = nullptr;
    for (const Range& r : sorted_) {
      if (r.bytes == 0) continue;
      if (r.begin < end) overlapping_ = true;
      end = std::max(end, r.begin + r.bytes);
    }
  }
  if (overlapping_) return true;
  for (const Entry& e : entries_) {
    if (e.g_is_alone || e.n == 0) continue;
    const char* begin = static_cast<const char*>(e.g_data);
    const char* end = begin + extent(e.t.g);
    auto after = std::upper_bound(sorted_.begin(), sorted_.end(), begin,
                                  [](const char* b, const Range& r) { return b < r.begin; });
    if ((after != sorted_.begin() && std::prev(after)->begin + std::prev(after)->bytes > begin) ||
        (after != sorted_.end() && after->begin < end))
      return true;
  }
  return false;
}

// ------------------------------------------------------------------------------------------------
// changing

void MultiTensorStep::run(const std::optional<Tensor>& grad_scale,
                          const std::optional<Tensor>& found_inf, bool moves_versions) {
  if (entries_.empty()) return;
  const bool skip_on_device = found_inf && skips_on_device();
  if (found_inf && !skip_on_device && found_inf->item<double>() != 0) return;
  at::AutoDispatchBelowADInplaceOrView below;
  const Scaling scaling{grad_scale, skip_on_device ? found_inf : std::nullopt};
  if (releases_interpreter_ || !overlapping()) {
    run(0, entries_.size(), scaling, moves_versions);
  } else {
    // Whoever writes the memory of another takes its turn, as in a loop over the parameters.
    for (size_t i = 0; i < entries_.size(); ++i) run(i, i + 1, scaling, moves_versions);
  }
}

// Whether an infinity in the gradients can be left to the kernels: nothing on the host depends on
// it.
bool MultiTensorStep::skips_on_device() const {
  return std::all_of(entries_.begin(), entries_.end(), [](const Entry& e) {
    const TensorImpl* count = e.t.scalar_states[0];
    return e.device.is_cuda() && !e.first && (!count || !count->is_cpu());
  });
}

// Steps entries [begin, end).
void MultiTensorStep::run(size_t begin, size_t end, const Scaling& scaling, bool moves_versions) {
  for (size_t i = begin; i < end; ++i) {
    entries_[i].bucket = kNoBucket;
    entries_[i].counted = false;
  }
  try {
    gather(begin, end);
    fill(begin, end);
    launch(scaling);
  } catch (...) {
    for (size_t i = end; i-- > begin;) {
      const Entry& e = entries_[i];
      if (e.counted && !stepped(e))
        e.each_scalar_state(
            [&](int k, TensorImpl*, void*) { e.write_scalar(k, e.scalars_before[k]); });
    }
    scatter();
    if (moves_versions) bump_versions(begin, end);
    throw;
  }
  scatter();
  if (moves_versions) bump_versions(begin, end);
}

// Working copies for the entries whose tensors differ in memory order. The copies are made before
// anything changes.
void MultiTensorStep::gather(size_t begin, size_t end) {
  copies_.clear();
  if (all_flat_) return;
  for (size_t i = begin; i < end; ++i) {
    Entry& e = entries_[i];
    if (e.flat) continue;
    TensorImpl*& p = e.t.p;
    const auto copy = [&](TensorImpl*& t, bool written) {
      Tensor original = tensor_of(t);
      Tensor work = at::empty_strided(original.sizes(), order_, original.options());
      work.copy_(original);
      copies_.push_back({std::move(original), std::move(work), &t, &e, written});
      t = copies_.back().work.unsafeGetTensorImpl();
    };
    order_.assign(p->strides().begin(), p->strides().end());
    if (!p->is_non_overlapping_and_dense()) {
      int64_t stride = 1;
      for (int64_t d = p->dim(); d-- > 0;) {
        order_[d] = stride;
        stride *= std::max<int64_t>(p->size(d), 1);
      }
      copy(p, true);
    } else if (is_lazy(p)) {
      copy(p, true);
    }
    if (!same_memory_order(p, e.t.g) || is_lazy(e.t.g)) copy(e.t.g, false);
    e.each_state([&](TensorImpl*& t, void*) {
      if (!same_memory_order(p, t) || is_lazy(t)) copy(t, true);
    });
    e.find_memory();
  }
}

// The entries get their own tensors back, and those of them that were stepped the new values.
void MultiTensorStep::scatter() {
  for (Copy& c : copies_) {
    *c.slot = c.original.unsafeGetTensorImpl();
    if (c.written && stepped(*c.entry)) c.original.copy_(c.work);
  }
  copies_.clear();
}

double MultiTensorStep::Entry::read_scalar(int k) const {
  return in_double >> k & 1 ? *static_cast<double*>(scalar_data[k])
                            : static_cast<double>(*static_cast<float*>(scalar_data[k]));
}

void MultiTensorStep::Entry::write_scalar(int k, double value) const {
  if (in_double >> k & 1) {
    *static_cast<double*>(scalar_data[k]) = value;
  } else {
    *static_cast<float*>(scalar_data[k]) = static_cast<float>(value);
  }
}

// Counts the steps and makes the tables for the kernels.
void MultiTensorStep::fill(size_t begin, size_t end) {
  std::erase_if(buckets_, [](const Bucket& b) { return b.on_device; });
  for (Bucket& b : buckets_) b.clear();
  scalars_.resize((end - begin) * kMaxScalars);
  double* scalars = scalars_.data();
  // Most parameters are stepped with the scalars of the one before.
  const Entry* last = nullptr;
  const double* current = nullptr;
  double before[kMaxScalarStates] = {}, after[kMaxScalarStates] = {};
  Bucket* bucket = nullptr;
  for (size_t i = begin; i < end; ++i) {
    Entry& e = entries_[i];
    const OptimizerKernel& kernel = kernels().data[e.options->kernel];
    if (!e.on_device) {
      bool alike = last && last->options == e.options && last->first == e.first &&
                   last->in_double == e.in_double;
      for (int k = 0; k < kernel.scalar_states; ++k) {
        e.scalars_before[k] = e.read_scalar(k);
        alike = alike && before[k] == e.scalars_before[k];
      }
      if (!alike) {
        std::copy_n(e.scalars_before, kMaxScalarStates, before);
        std::copy_n(before, kMaxScalarStates, after);
        if (kernel.scalar_states > 0)
          after[0] = e.in_double & 1 ? before[0] + 1
                                     : static_cast<double>(static_cast<float>(before[0]) + 1.0f);
        kernel.scalars_for_step(e.options->values, e.first, after, e.in_double, scalars);
        current = scalars;
        scalars += kernel.scalars;
        last = &e;
      }
      for (int k = 0; k < kernel.scalar_states; ++k) e.write_scalar(k, after[k]);
      e.counted = true;
    }
    if (e.n == 0 && !e.on_device) continue;
    bucket = &bucket_for(e, bucket);
    OptimizerTensor& t = bucket->tensors.emplace_back(
        OptimizerTensor{e.n, e.p_data, e.g_data, {}, e.on_device ? nullptr : current, nullptr, 0});
    for (int k = 0; k < kernel.states; ++k) t.s[k] = e.s_data[k];
    if (e.t.average) {
      t.average = e.average_data;
      t.weight = e.weight;
    }
    if (e.options->stochastic) {
      const bool counts = kernel.scalar_states > 0;  // on the device, where those are
      const uint32_t step =
          !counts ? e.options->step : static_cast<uint32_t>(e.on_device ? 0 : after[0]);
      bucket->noise.push_back({e.options->seed, step, e.number});
    }
    if (e.on_device) {
      for (int k = 0; k < kernel.scalar_states; ++k)
        bucket->scalar_states[k].push_back(e.scalar_data[k]);
      bucket->first.push_back(e.first);
    }
    bucket->any = e.t.p;
    e.bucket = static_cast<size_t>(bucket - buckets_.data());
  }
}

bool MultiTensorStep::Bucket::takes(const Entry& e) const {
  return kernel == e.options->kernel && device == e.device && dtype == e.dtype &&
         state_dtype == e.state_dtype && stochastic == e.options->stochastic &&
         on_device == e.on_device &&
         (!on_device || (options == e.options && in_double == e.in_double));
}

void MultiTensorStep::Bucket::clear() {
  tensors.clear();
  noise.clear();
  for (auto& each : scalar_states) each.clear();
  first.clear();
  launched = false;
}

MultiTensorStep::Bucket& MultiTensorStep::bucket_for(const Entry& e, Bucket* guess) {
  if (guess && guess->takes(e)) return *guess;
  for (Bucket& b : buckets_)
    if (b.takes(e)) return b;
  return buckets_.emplace_back(Bucket{.kernel = e.options->kernel,
                                      .device = e.device,
                                      .dtype = e.dtype,
                                      .state_dtype = e.state_dtype,
                                      .stochastic = e.options->stochastic,
                                      .on_device = e.on_device,
                                      .in_double = e.in_double,
                                      .options = e.options});
}

void MultiTensorStep::launch(const Scaling& scaling) {
  std::optional<pybind11::gil_scoped_release> released;
  if (releases_interpreter_) released.emplace();
  for (Bucket& b : buckets_) {
    if (b.tensors.empty()) continue;
    const c10::OptionalDeviceGuard guard(b.device);
    const OptimizerKernel& kernel = tables(b.device.type()).optimizer.data[b.kernel];
    OptimizerArgs a{};
    a.dtype = b.dtype;
    a.state_dtype = b.state_dtype;
    a.count = static_cast<int64_t>(b.tensors.size());
    a.tensors = b.tensors.data();
    Tensor scale, found, scalars;
    if (scaling.grad_scale) {
      scale = scaling.grad_scale->to(b.device, at::kFloat);
      a.grad_scale = scale.const_data_ptr<float>();
    }
    if (scaling.found_inf) {
      found = scaling.found_inf->to(b.device, at::kFloat);
      a.found_inf = found.const_data_ptr<float>();
    }
    if (b.stochastic) a.noise = b.noise.data();
    if (!b.device.is_cpu()) a.stream = stream_of(tensor_of(b.any));
    OptimizerOnDevice on_device{};
    std::vector<Tensor> options;
    if (b.on_device) {
      std::copy_n(b.options->values, kMaxOptions, on_device.options);
      for (const Tensor& t : b.options->memory) {
        options.push_back(t.defined() ? t.to(b.device, at::kDouble) : t);
        if (t.defined())
          on_device.option_at[options.size() - 1] = options.back().const_data_ptr<double>();
      }
      scalars = at::empty({a.count * kScalarsBytes}, at::dtype(at::kByte).device(b.device));
      on_device.scalars = scalars.mutable_data_ptr();
      on_device.in_double = b.in_double;
      for (int k = 0; k < kMaxScalarStates; ++k)
        on_device.scalar_states[k] = b.scalar_states[k].data();
      on_device.first = reinterpret_cast<const bool*>(b.first.data());
      a.on_device = &on_device;
    }
    check(kernel.name, kernel.step(a));
    b.launched = true;
  }
}

// Whether an entry is past its step in this run.
bool MultiTensorStep::stepped(const Entry& e) const {
  return e.bucket != kNoBucket && buckets_[e.bucket].launched;
}

void MultiTensorStep::bump_versions(size_t begin, size_t end) const {
  for (size_t i = begin; i < end; ++i) {
    const Entry& e = entries_[i];
    if (e.n > 0 && !stepped(e)) continue;
    e.t.p->bump_version();
    e.each_scalar_state([](int, TensorImpl* t, void*) { t->bump_version(); });
    e.each_state([](TensorImpl* t, void*) { t->bump_version(); });
  }
}

}  // namespace fastops
