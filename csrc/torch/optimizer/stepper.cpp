// The optimizers' step as torch sees it: an op over lists of tensors for every row, and beside it
// OptimizerStepper, which reads parameters, gradients and states from the optimizer's own
// dictionaries. Both collect into one MultiTensorStep, which checks everything before it changes
// anything. No formula, and no option by name.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/jit_type.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../backend.h"
#include "../bind.h"

namespace fastops {
namespace {

namespace py = pybind11;
using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::TensorImpl;

// Below this many elements a step is over before another thread could have used the interpreter.
constexpr int64_t kReleaseInterpreter = 1 << 17;
// So many parameters ahead of the one looked at, the memory of the next is asked for.
constexpr size_t kAhead = 4;

// ------------------------------------------------------------------------------------------------
// tensors

// Subclasses with a say in dispatch, wrappers of torch.func, fake tensors: whose memory is not
// theirs to be read.
constexpr DispatchKeySet kWrapped = DispatchKeySet(
    {DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::FuncTorchBatched,
     DispatchKey::FuncTorchGradWrapper, DispatchKey::Batched, DispatchKey::NestedTensor});
// Values that are not what the memory says until they are resolved.
constexpr DispatchKeySet kLazy =
    DispatchKeySet({DispatchKey::Conjugate, DispatchKey::Negative, DispatchKey::ZeroTensor});

bool plain(const TensorImpl* t) {
  const DispatchKeySet keys = t->key_set();
  return keys.has(DispatchKey::Dense) && !keys.has_any(kWrapped) && (t->is_cpu() || t->is_cuda()) &&
         t->unsafe_storage();
}

Tensor tensor_of(TensorImpl* t) { return Tensor(c10::intrusive_ptr<TensorImpl>::reclaim_copy(t)); }

// Whether element i in memory of one is element i in memory of the other; `a` is dense.
bool same_memory_order(const TensorImpl* a, const TensorImpl* b) {
  if (a->is_contiguous() && b->is_contiguous()) return true;
  const auto sizes = a->sizes(), sa = a->strides(), sb = b->strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sa[d] != sb[d] && sizes[d] != 1) return false;
  return true;
}
bool lazy(const TensorImpl* t) { return t->key_set().has_any(kLazy); }

c10::ScalarType dtype_of(const TensorImpl* t) { return c10::typeMetaToScalarType(t->dtype()); }

bool equal(c10::IntArrayRef a, c10::IntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t d = 0; d < a.size(); ++d)
    if (a[d] != b[d]) return false;
  return true;
}

// ------------------------------------------------------------------------------------------------
// sweep

// What a group of parameters is stepped with.
struct Options {
  size_t row = 0;
  double values[kMaxOptions] = {};
  std::vector<Tensor>
      memory;  // per option: a tensor on a CUDA device that holds it instead; empty where none does
  bool stochastic =
      false;  // rounding to bfloat16, with this seed and, where steps are not counted, step
  int64_t seed = 0;
  uint32_t step = 0;
};

constexpr size_t kNoBucket = SIZE_MAX;

struct Entry {
  TensorImpl *p, *g, *counter;
  TensorImpl* s[kMaxStates];
  TensorImpl* average;  // or null
  const Options* options;
  uint32_t number;  // of the parameter in its group
  int64_t n;
  c10::ScalarType dtype, state_dtype;
  c10::Device device;
  bool first;
  bool flat;        // p, g and s share one dense memory order
  bool g_is_alone;  // on its storage
  bool counts_in_double;
  bool on_device;  // the step count or an option is: the scalars of the step are made there
  void* count;
  double count_before;  // this step, where it is counted
  bool counted;
  size_t bucket;  // that steps it, or kNoBucket
  void* p_data;
  const void* g_data;
  void* s_data[kMaxStates];
  void* average_data;
  double weight;  // of the parameter in its average

  void find_memory() {
    p_data = p->mutable_data();
    g_data = g->data();
    for (int k = 0; k < kMaxStates && s[k]; ++k) s_data[k] = s[k]->mutable_data();
    if (average) average_data = average->mutable_data();
  }
  // What is written besides the parameter.
  template <class F>
  void each_state(F f) {
    for (int k = 0; k < kMaxStates && s[k]; ++k) f(s[k], s_data[k]);
    if (average) f(average, average_data);
  }
  template <class F>
  void each_state(F f) const {
    for (int k = 0; k < kMaxStates && s[k]; ++k) f(s[k], s_data[k]);
    if (average) f(average, average_data);
  }
};

// Asks for the cache lines of a tensor that is looked at soon. `t` may be long gone: it is a guess.
void prefetch(const TensorImpl* t) {
  const char* lines = reinterpret_cast<const char*>(t);
  for (size_t at = 0; at < sizeof(TensorImpl); at += 64) __builtin_prefetch(lines + at, 0, 2);
}

// One step. add() checks and collects, run() changes.
class MultiTensorStep {
 public:
  void clear() {
    std::swap(entries_, before_);
    entries_.clear();
    copies_.clear();
    elements_ = 0;
    all_flat_ = true;
  }
  size_t size() const { return entries_.size(); }

  // `options` must stay where they are until run() is over.
  void add(const Options& options, uint32_t number, bool first, TensorImpl* p, TensorImpl* g,
           TensorImpl* counter, TensorImpl* const* s, TensorImpl* average = nullptr,
           double weight = 0) {
    const OptimizerKernel& r = rows_.data[options.row];
    Entry& e = entries_.emplace_back(Entry{p,
                                           g,
                                           counter,
                                           {},
                                           nullptr,
                                           &options,
                                           number,
                                           p->numel(),
                                           dtype_of(p),
                                           dtype_of(p),
                                           p->device(),
                                           first});
    // A complex number is a pair of real ones to every formula, as in torch.
    if (c10::isComplexType(e.dtype)) {
      e.n *= 2;
      e.dtype = e.state_dtype = c10::toRealValueType(e.dtype);
    }
    const bool reduced = e.dtype == c10::kHalf || e.dtype == c10::kBFloat16;
    TORCH_CHECK_NOT_IMPLEMENTED(e.dtype == c10::kFloat || e.dtype == c10::kDouble || reduced,
                                r.name, ": parameter ", entries_.size() - 1, " is ", dtype_of(p),
                                "; the optimizers take floating point and complex parameters");
    const bool dense = p->is_non_overlapping_and_dense();
    e.flat = dense && !lazy(p);
    writable(r, "parameter", p);
    if (!dense) at::assert_no_internal_overlap(p);

    matches(r, "the gradient", g, p);
    TORCH_CHECK(g->dtype() == p->dtype(), r.name, ": parameter ", entries_.size() - 1, " is ",
                dtype_of(p), " but its gradient is ", dtype_of(g),
                "; give it a gradient of the parameter's dtype");
    e.flat = e.flat && same_memory_order(p, g) && !lazy(g);
    for (int k = 0; k < r.states; ++k) {
      e.s[k] = s[k];
      writable(r, "state", s[k]);
      matches(r, "a state", s[k], p);
      TORCH_CHECK(s[k]->dtype() == s[0]->dtype(), r.name, ": the states of parameter ",
                  entries_.size() - 1, " are ", dtype_of(s[0]), " and ", dtype_of(s[k]),
                  "; they must be of one dtype");
      if (!dense || !same_memory_order(p, s[k]) || lazy(s[k])) {
        e.flat = false;
        if (!s[k]->is_non_overlapping_and_dense()) at::assert_no_internal_overlap(s[k]);
      }
    }
    if (average) {
      const auto wanted = reduced ? c10::kFloat : dtype_of(p);
      e.average = average;
      e.weight = weight;
      writable(r, "average", average);
      matches(r, "its average", average, p);
      TORCH_CHECK(dtype_of(average) == wanted, r.name, ": the average of parameter ",
                  entries_.size() - 1, " is ", dtype_of(average), "; of ", dtype_of(p),
                  " parameters it must be ", wanted);
      if (!dense || !same_memory_order(p, average) || lazy(average)) {
        e.flat = false;
        if (!average->is_non_overlapping_and_dense()) at::assert_no_internal_overlap(average);
      }
    }
    if (r.states > 0 && s[0]->dtype() != p->dtype()) {
      e.state_dtype = dtype_of(s[0]);
      TORCH_CHECK((reduced && e.state_dtype == c10::kFloat) ||
                      (dtype_of(p) == c10::kFloat && e.state_dtype == c10::kBFloat16),
                  r.name, ": parameter ", entries_.size() - 1, " is ", dtype_of(p),
                  " but its states are ", e.state_dtype);
    }
    TORCH_CHECK(!options.stochastic || (e.dtype != c10::kHalf && e.state_dtype != c10::kHalf),
                r.name, ": parameter ", entries_.size() - 1,
                " is Half; rounding=\"stochastic\" is for BFloat16");
    if (r.counts) {
      writable(r, "step count", counter);
      TORCH_CHECK(
          counter->numel() == 1 && (counter->is_cpu() || counter->device() == p->device()) &&
              (dtype_of(counter) == c10::kFloat || dtype_of(counter) == c10::kDouble),
          r.name,
          ": the step count must be one float32 or float64 on the CPU or where its parameter is");
      e.count = counter->mutable_data();
      e.counts_in_double = dtype_of(counter) == c10::kDouble;
    }
    e.on_device = (r.counts && !counter->is_cpu()) || !options.memory.empty();
    e.g_is_alone = g->unsafe_storage().unique();
    e.find_memory();
    elements_ += e.n;
    all_flat_ = all_flat_ && e.flat;
  }

  // Lets other threads use the interpreter while kernels run on much memory; ask before clip() and
  // run(), while the interpreter's lock is held. Other threads may then drop or replace any of the
  // tensors: they and their memory are owned from here until the result is destroyed. Where working
  // copies are needed the lock is held, since the tensors themselves are read after the kernels.
  class Ownership {
   public:
    explicit Ownership(MultiTensorStep& step) : step_(step) {
      if (!step_.releases_interpreter_) return;
      const auto own = [&](TensorImpl* t) {
        step_.owned_.push_back(tensor_of(t));
        step_.owned_memory_.push_back(t->storage());  // a tensor can get another: p.data = ...
      };
      for (const Entry& e : step_.entries_) {
        own(e.p);
        own(e.g);
        if (e.counter) own(e.counter);
        e.each_state([&](TensorImpl* t, void*) { own(t); });
      }
    }
    Ownership(const Ownership&) = delete;
    ~Ownership() {
      step_.releases_interpreter_ = false;
      step_.owned_.clear();
      step_.owned_memory_.clear();
    }

   private:
    MultiTensorStep& step_;
  };
  [[nodiscard]] Ownership share_interpreter() {
    releases_interpreter_ = elements_ > kReleaseInterpreter && all_flat_ && !overlapping();
    return Ownership(*this);
  }

  // grad_scale and found_inf as torch.amp.GradScaler hands them over. Leaves version counters alone
  // on request, where the dispatcher's ADInplaceOrView key sees to them. Where this throws,
  // parameters that were not stepped have their step counts from before.
  void run(const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
           bool moves_versions) {
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

  // The norm of all gradients together, divided by grad_scale, and what the gradients are to be
  // divided by for it to be at most max_norm, grad_scale included: two float32 on the gradients'
  // device, which is not waited for. Undefined where not all gradients are dense and on one device.
  Tensor clip(const std::optional<Tensor>& grad_scale, double max_norm) {
    for (Bucket& b : grads_) b.tensors.clear();
    const c10::Device device = entries_[0].device;
    if (grad_scale && grad_scale->device() != device) return {};
    int64_t count = 0;
    for (const Entry& e : entries_) {
      if (e.device != device || lazy(e.g) || !e.g->is_non_overlapping_and_dense()) return {};
      Bucket* bucket = nullptr;
      for (Bucket& b : grads_)
        if (b.dtype == e.dtype) bucket = &b;
      if (!bucket) {
        bucket = &grads_.emplace_back();
        bucket->dtype = e.dtype;
      }
      bucket->tensors.push_back({e.n, nullptr, e.g_data, {}, nullptr, nullptr, 0});
      count += gradient_norm_chunks(e.n);
    }
    const c10::DeviceGuard guard(device);
    const Tensor made = at::empty({2}, at::dtype(at::kFloat).device(device));
    const Tensor scale = grad_scale ? grad_scale->to(at::kFloat) : Tensor();
    Tensor on_device;
    double* sums = nullptr;
    if (device.is_cpu()) {
      sums_.resize(static_cast<size_t>(count));
      sums = sums_.data();
    } else {
      on_device = at::empty({count}, at::dtype(at::kDouble).device(device));
      sums = on_device.mutable_data_ptr<double>();
    }
    std::optional<py::gil_scoped_release> released;
    if (releases_interpreter_) released.emplace();
    const GradientNormKernel& row = tables(device.type()).gradient_norm;
    void* const stream = stream_of(made);
    double* next = sums;
    for (const Bucket& b : grads_) {
      OptimizerArgs a{};
      a.dtype = b.dtype;
      a.count = static_cast<int64_t>(b.tensors.size());
      a.tensors = b.tensors.data();
      a.stream = stream;
      check("grad_norm", row.sums(a, next));
      for (const OptimizerTensor& t : b.tensors) next += gradient_norm_chunks(t.n);
    }
    float* const out = made.mutable_data_ptr<float>();
    check("grad_norm",
          row.clip({count, sums, scale.defined() ? scale.const_data_ptr<float>() : nullptr,
                    max_norm, out, out + 1, stream}));
    return made;
  }

  // Asks for what add() will look at when it is called for the k-th time, if this step is like the
  // last.
  void expect(size_t k) const {
    if (k >= before_.size()) return;
    const Entry& e = before_[k];
    prefetch(e.p);
    prefetch(e.g);
    if (e.counter) prefetch(e.counter);
    e.each_state([](TensorImpl* t, void*) { prefetch(t); });
  }

 private:
  struct Bucket {  // what one kernel call can do
    TensorImpl* any = nullptr;
    size_t row = 0;
    c10::Device device = c10::kCPU;
    c10::ScalarType dtype = c10::kFloat, state_dtype = c10::kFloat;
    bool stochastic = false, on_device = false, counts_in_double = false;
    const Options* options = nullptr;  // where on_device
    std::vector<OptimizerTensor> tensors;
    std::vector<OptimizerNoise> noise;  // where stochastic; those below where on_device
    std::vector<void*> counts;
    std::vector<unsigned char> first;
    bool launched = false;

    bool takes(const Entry& e) const {
      return row == e.options->row && device == e.device && dtype == e.dtype &&
             state_dtype == e.state_dtype && stochastic == e.options->stochastic &&
             on_device == e.on_device &&
             (!on_device || (options == e.options && counts_in_double == e.counts_in_double));
    }
    void clear() {
      tensors.clear();
      noise.clear();
      counts.clear();
      first.clear();
      launched = false;
    }
  };
  struct Scaling {
    std::optional<Tensor> grad_scale, found_inf;  // for the kernels to read
  };
  struct Copy {
    Tensor original, work;
    TensorImpl** slot;  // in an entry: points to `work` until scatter()
    const Entry* entry;
    bool written;
  };

  void writable(const OptimizerKernel& r, const char* what, TensorImpl* t) const {
    TORCH_CHECK(t->key_set().has(DispatchKey::ADInplaceOrView) || c10::InferenceMode::is_enabled(),
                r.name, ": the ", what, " of parameter ", entries_.size() - 1,
                " is an inference tensor. Inplace update to inference tensor outside InferenceMode "
                "is not allowed");
  }
  void matches(const OptimizerKernel& r, const char* what, TensorImpl* t, TensorImpl* p) const {
    TORCH_CHECK(equal(t->sizes(), p->sizes()), r.name, ": parameter ", entries_.size() - 1,
                " has shape ", p->sizes(), " but ", what, " has shape ", t->sizes());
    TORCH_CHECK(t->device() == p->device(), r.name, ": parameter ", entries_.size() - 1, " is on ",
                p->device(), " but ", what, " is on ", t->device());
  }

  // Whether two of the tensors written, or one written and one gradient, share memory. The answer
  // stands as long as the pointers do; a gradient that is alone on its storage shares it with
  // nobody.
  bool overlapping() {
    bool same = true;
    size_t k = 0;
    auto see = [&](const Entry& e, TensorImpl* t, void* data) {
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
      see(e, e.p, e.p_data);
      e.each_state([&](TensorImpl* t, void* data) { see(e, t, data); });
      if (e.on_device && e.counter) see(e, e.counter, e.count);
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
      const char* end = begin + extent(e.g);
      auto after = std::upper_bound(sorted_.begin(), sorted_.end(), begin,
                                    [](const char* b, const Range& r) { return b < r.begin; });
      if ((after != sorted_.begin() && std::prev(after)->begin + std::prev(after)->bytes > begin) ||
          (after != sorted_.end() && after->begin < end))
        return true;
    }
    return false;
  }

  // Bytes from the first element to the end of the last.
  static int64_t extent(TensorImpl* t) {
    if (t->numel() == 0) return 0;
    int64_t last = 0;
    if (t->is_non_overlapping_and_dense()) {
      last = t->numel() - 1;
    } else {
      for (int64_t d = 0; d < t->dim(); ++d) last += (t->size(d) - 1) * t->stride(d);
    }
    return (last + 1) * static_cast<int64_t>(t->itemsize());
  }

  // Steps entries [begin, end).
  void run(size_t begin, size_t end, const Scaling& scaling, bool moves_versions) {
    try {
      gather(begin, end);
      fill(begin, end);
      launch(scaling);
    } catch (...) {
      for (size_t i = end; i-- > begin;) restore_count(entries_[i]);
      scatter();
      if (moves_versions) bump_versions(begin, end);
      throw;
    }
    scatter();
    if (moves_versions) bump_versions(begin, end);
  }

  // Working copies for the entries whose tensors differ in memory order. The copies are made before
  // anything changes.
  void gather(size_t begin, size_t end) {
    copies_.clear();
    for (size_t i = begin; i < end; ++i) entries_[i].bucket = kNoBucket;
    if (all_flat_) return;
    for (size_t i = begin; i < end; ++i) {
      Entry& e = entries_[i];
      if (e.flat) continue;
      auto copy = [&](TensorImpl*& t, bool written) {
        Tensor original = tensor_of(t);
        Tensor work = at::empty_strided(original.sizes(), order_, original.options());
        work.copy_(original);
        copies_.push_back({std::move(original), std::move(work), &t, &e, written});
        t = copies_.back().work.unsafeGetTensorImpl();
      };
      order_.assign(e.p->strides().begin(), e.p->strides().end());
      if (!e.p->is_non_overlapping_and_dense()) {
        int64_t stride = 1;
        for (int64_t d = e.p->dim(); d-- > 0;) {
          order_[d] = stride;
          stride *= std::max<int64_t>(e.p->size(d), 1);
        }
        copy(e.p, true);
      } else if (lazy(e.p)) {
        copy(e.p, true);
      }
      if (!same_memory_order(e.p, e.g) || lazy(e.g)) copy(e.g, false);
      e.each_state([&](TensorImpl*& t, void*) {
        if (!same_memory_order(e.p, t) || lazy(t)) copy(t, true);
      });
      e.find_memory();
    }
  }
  // Whether an entry of this run is past its step.
  bool stepped(const Entry& e) const {
    return e.bucket != kNoBucket && buckets_[e.bucket].launched;
  }
  // The entries get their own tensors back, and those the new values.
  void scatter() {
    for (Copy& c : copies_) {
      *c.slot = c.original.unsafeGetTensorImpl();
      if (c.written && stepped(*c.entry)) c.original.copy_(c.work);
    }
    copies_.clear();
  }

  // Whether an infinity in the gradients can be left to the kernels: nothing on the host depends on
  // it.
  bool skips_on_device() const {
    return std::all_of(entries_.begin(), entries_.end(), [](const Entry& e) {
      return e.device.is_cuda() && !e.first && (!e.counter || !e.counter->is_cpu());
    });
  }

  // Counts the steps and makes the tables for the kernels.
  void fill(size_t begin, size_t end) {
    std::erase_if(buckets_, [](const Bucket& b) { return b.on_device; });
    for (Bucket& b : buckets_) b.clear();
    scalars_.resize((end - begin) * kMaxScalars);
    double* scalars = scalars_.data();
    const Entry* last = nullptr;  // whose scalars `current` are
    double last_count = -1;
    const double* current = nullptr;
    Bucket* bucket = nullptr;
    for (size_t i = begin; i < end; ++i) {
      Entry& e = entries_[i];
      double count = 0;
      if (e.counter && !e.on_device) {
        e.count_before = read_count(e);
        count = e.counts_in_double ? *static_cast<double*>(e.count) += 1
                                   : *static_cast<float*>(e.count) += 1;
        e.counted = true;
      }
      if (e.n == 0 && !e.on_device) continue;
      if (!e.on_device &&
          (!last || last->options != e.options || last->first != e.first || last_count != count)) {
        const OptimizerKernel& r = rows_.data[e.options->row];
        r.scalars_for_step(e.options->values, count, e.first, scalars);
        current = scalars;
        scalars += r.scalars;
        last = &e;
        last_count = count;
      }
      if (!bucket || !bucket->takes(e)) {
        bucket = nullptr;
        for (Bucket& b : buckets_)
          if (b.takes(e)) bucket = &b;
        if (!bucket) {
          bucket = &buckets_.emplace_back();
          bucket->row = e.options->row;
          bucket->device = e.device;
          bucket->dtype = e.dtype;
          bucket->state_dtype = e.state_dtype;
          bucket->stochastic = e.options->stochastic;
          bucket->on_device = e.on_device;
          bucket->counts_in_double = e.counts_in_double;
          bucket->options = e.options;
        }
      }
      OptimizerTensor& t = bucket->tensors.emplace_back(OptimizerTensor{
          e.n, e.p_data, e.g_data, {}, e.on_device ? nullptr : current, nullptr, 0});
      for (int k = 0; k < kMaxStates && e.s[k]; ++k) t.s[k] = e.s_data[k];
      if (e.average) {
        t.average = e.average_data;
        t.weight = e.weight;
      }
      if (e.options->stochastic)
        bucket->noise.push_back({e.options->seed,
                                 e.counter ? static_cast<uint32_t>(count) : e.options->step,
                                 e.number});
      if (e.on_device) {
        bucket->counts.push_back(e.counter ? e.count : nullptr);
        bucket->first.push_back(e.first);
      }
      bucket->any = e.p;
      e.bucket = static_cast<size_t>(bucket - buckets_.data());
    }
  }

  static double read_count(const Entry& e) {
    return e.counts_in_double ? *static_cast<double*>(e.count) : *static_cast<float*>(e.count);
  }
  void restore_count(Entry& e) const {
    if (!e.counted || stepped(e)) return;
    if (e.counts_in_double) {
      *static_cast<double*>(e.count) = e.count_before;
    } else {
      *static_cast<float*>(e.count) = static_cast<float>(e.count_before);
    }
    e.counted = false;
  }

  void bump_versions(size_t begin, size_t end) const {
    for (size_t i = begin; i < end; ++i) {
      const Entry& e = entries_[i];
      if (e.n > 0 && !stepped(e)) continue;
      e.p->bump_version();
      if (e.counter) e.counter->bump_version();
      e.each_state([](TensorImpl* t, void*) { t->bump_version(); });
    }
  }

  void launch(const Scaling& scaling) {
    std::optional<py::gil_scoped_release> released;
    if (releases_interpreter_) released.emplace();
    for (Bucket& b : buckets_) {
      if (b.tensors.empty()) continue;
      const c10::OptionalDeviceGuard guard(b.device);
      const OptimizerKernel& r = tables(b.device.type()).optimizer.data[b.row];
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
        on_device.counts_in_double = b.counts_in_double;
        on_device.counts = b.counts.data();
        on_device.first = reinterpret_cast<const bool*>(b.first.data());
        a.on_device = &on_device;
      }
      check(r.name, r.step(a));
      b.launched = true;
    }
  }

  const KernelTable<OptimizerKernel> rows_ = tables(c10::DeviceType::CPU).optimizer;
  std::vector<Entry> entries_, before_;  // of this step and of the last
  int64_t elements_ = 0;
  bool all_flat_ = true;
  std::vector<Bucket> buckets_, grads_;
  std::vector<double> scalars_, sums_;
  std::vector<Copy> copies_;
  std::vector<int64_t> order_;
  std::vector<Tensor> owned_;
  std::vector<c10::Storage> owned_memory_;
  bool releases_interpreter_ = false;
  struct Range {
    const char* begin;
    int64_t bytes;
  };
  std::vector<Range> written_, sorted_;
  bool overlapping_ = false;
};
for (const Entry& e : step_.entries_) {
  own(e.p);
  own(e.g);
  if (e.counter) own(e.counter);
  e.each_state([&](TensorImpl* t, void*) { own(t); });
}
}
Ownership(const Ownership&) = delete;
~Ownership() {
  step_.releases_interpreter_ = false;
  step_.owned_.clear();
  step_.owned_memory_.clear();
}

private:
MultiTensorStep & step_;
};

// ------------------------------------------------------------------------------------------------
// the op row_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, ..., Tensor(z!)[] step, *,
// options,
//      Tensor? grad_scale=None, Tensor? found_inf=None) -> ()

std::string schema(const OptimizerKernel& r) {
  std::string s = std::string(r.name) + "_(Tensor(a!)[] params, Tensor[] grads";
  char alias = 'b';
  const std::string names = r.state_names;
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = std::min(names.find(' ', begin), names.size());
    s += std::string(", Tensor(") + alias++ + "!)[] " + names.substr(begin, end - begin);
    begin = end + 1;
  }
  if (r.counts) s += std::string(", Tensor(") + alias++ + "!)[] step";
  return s + ", *, " + r.options + ", Tensor? grad_scale=None, Tensor? found_inf=None) -> ()";
}

// The arguments of an op's call, off the stack.
struct Arguments {
  Options options;
  std::vector<std::vector<Tensor>> lists;  // params, grads, states ..., step
  std::optional<Tensor> grad_scale, found_inf;
};

size_t row_of(const c10::OperatorHandle& op) {
  const std::string& name = op.schema().name();  // fastops::adam_
  const auto& rows = tables(c10::DeviceType::CPU).optimizer;
  for (size_t i = 0; i < rows.size; ++i)
    if (name == std::string("fastops::") + rows.data[i].name + "_") return i;
  TORCH_INTERNAL_ASSERT(false, name);
}

Arguments arguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  Arguments a;
  a.options.row = row_of(op);
  const size_t n = op.schema().arguments().size();
  const auto* in = stack.data() + stack.size() - n;
  size_t k = 0;
  for (; in[k].isTensorList(); ++k) a.lists.push_back(in[k].toTensorVector());
  for (const auto& list : a.lists)
    TORCH_CHECK(list.size() == a.lists[0].size(), op.schema().name(), ": ", a.lists[0].size(),
                " params but ", list.size(), " of ",
                op.schema().arguments()[&list - a.lists.data()].name());
  for (double* value = a.options.values; k < n - 2; ++k)
    *value++ = in[k].isBool() ? static_cast<double>(in[k].toBool()) : in[k].toDouble();
  a.grad_scale = in[k].toOptional<Tensor>();
  a.found_inf = in[k + 1].toOptional<Tensor>();
  return a;
}

void step_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const Arguments a = arguments(op, *stack);
  const OptimizerKernel& r = tables(c10::DeviceType::CPU).optimizer.data[a.options.row];
  MultiTensorStep multi_tensor_step;
  for (size_t i = 0; i < a.lists[0].size(); ++i) {
    const auto impl = [&](size_t list) {
      TensorImpl* t = a.lists[list][i].unsafeGetTensorImpl();
      TORCH_CHECK(plain(t), op.schema().name(), ": ", op.schema().arguments()[list].name(), "[", i,
                  "] is not an ordinary dense tensor on the CPU or a CUDA device");
      return t;
    };
    TensorImpl* s[kMaxStates];
    for (int k = 0; k < r.states; ++k) s[k] = impl(2 + k);
    multi_tensor_step.add(a.options, static_cast<uint32_t>(i), false, impl(0), impl(1),
                          r.counts ? impl(2 + r.states) : nullptr, s);
  }
  multi_tensor_step.run(a.grad_scale, a.found_inf, /*moves_versions=*/false);
  torch::jit::drop(*stack, op.schema().arguments().size());
}

void step_meta(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
}

void step_autograd(const c10::OperatorHandle& op, DispatchKeySet ks, torch::jit::Stack* stack) {
  if (at::GradMode::is_enabled()) {
    const Arguments a = arguments(op, *stack);
    for (const auto& list : a.lists)
      for (const Tensor& t : list)
        TORCH_CHECK(&list == &a.lists[1] || !t.requires_grad(), op.schema().name(),
                    ": call it under torch.no_grad(), as an optimizer's step does");
  }
  at::AutoDispatchBelowAutograd below;
  op.redispatchBoxed(ks & c10::after_autograd_keyset, stack);
}

// torch's own fallback does not move the versions of the tensors in a Tensor(a!)[].
void step_versions(const c10::OperatorHandle& op, DispatchKeySet ks, torch::jit::Stack* stack) {
  const Arguments a = arguments(op, *stack);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(ks & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (size_t k = 0; k < a.lists.size(); ++k)
    if (k != 1)
      for (const Tensor& t : a.lists[k])
        if (!t.is_inference()) torch::autograd::impl::bump_version(t);
}

TORCH_LIBRARY_FRAGMENT(fastops, m) {
  for (const OptimizerKernel& r : tables(c10::DeviceType::CPU).optimizer) {
    m.def(schema(r).c_str(), {at::Tag::pt2_compliant_tag});
    const std::string name = std::string(r.name) + "_";
    const auto impl = [&](DispatchKey key, torch::CppFunction f) {
      m.impl(name.c_str(), torch::dispatch(key, std::move(f)));
    };
    impl(DispatchKey::CPU, torch::CppFunction::makeFromBoxedFunction<&step_kernel>());
    if (cuda_built())
      impl(DispatchKey::CUDA, torch::CppFunction::makeFromBoxedFunction<&step_kernel>());
    impl(DispatchKey::Meta, torch::CppFunction::makeFromBoxedFunction<&step_meta>());
    impl(DispatchKey::Autograd, torch::CppFunction::makeFromBoxedFunction<&step_autograd>());
    impl(DispatchKey::ADInplaceOrView, torch::CppFunction::makeFromBoxedFunction<&step_versions>());
  }
}

// ------------------------------------------------------------------------------------------------
// OptimizerStepper

// Steps an optimizer's parameters as they stand in its `state` and groups. What it keeps between
// steps are memory and guesses (where in a dictionary an entry was), never an assumption: each step
// reads everything anew.
class OptimizerStepper {
 public:
  OptimizerStepper() {
    average_key_ = py::reinterpret_steal<py::object>(PyUnicode_InternFromString("ema"));
    counter_key_ = py::reinterpret_steal<py::object>(PyUnicode_InternFromString("step"));
    for (const OptimizerKernel& r : tables(c10::DeviceType::CPU).optimizer) {
      auto& keys = state_keys_.emplace_back();
      const std::string names = r.state_names;
      for (size_t begin = 0; begin < names.size();) {
        const size_t end = std::min(names.find(' ', begin), names.size());
        keys.push_back(py::reinterpret_steal<py::object>(
            PyUnicode_InternFromString(names.substr(begin, end - begin).c_str())));
        begin = end + 1;
      }
    }
  }

  // One step of groups = [(row, params, options, (seed, step) of stochastic rounding or None),
  // ...], of the parameters that have a gradient. An option is a number, or a tensor on a CUDA
  // device that holds it. Returns None, or, with nothing changed, a pair of lists of (number of the
  // group, parameter): those without state, and those that are not ordinary tensors. `fresh`: the
  // parameters whose state has just been made, `started`: whose average has. `partial`: leave the
  // second kind out.
  // `apart`: some of those all the same, as (number of the group, parameter, [what stands for it,
  // its gradient, states ..., step count], average or None), ordinary tensors. `check_only`: change
  // nothing at all. `ema_weight`: what of the new parameters goes into the averages that are kept
  // under "ema"; everything, the first time. `max_grad_norm`: scale the gradients so that their
  // norm is no more, and leave the norm in `grad_norm`; returns False, with nothing changed, where
  // the norm is not for the kernels to take.
  py::object step(const py::dict& state, const py::list& groups,
                  const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                  const py::list& fresh, const py::list& started, const py::list& apart,
                  bool partial, bool check_only, std::optional<double> ema_weight,
                  std::optional<double> max_grad_norm) {
    // The kernels run without the interpreter's lock: another thread could come in here, and pull
    // the lists from under them.
    TORCH_CHECK(!stepping_,
                "step() of this optimizer is under way in another thread; one step at a time");
    const Flag stepping(stepping_);
    ema_weight_ = ema_weight;
    multi_tensor_step_.clear();
    fresh_.clear();
    started_.clear();
    for (const auto& p : fresh) fresh_.insert(p.ptr());
    for (const auto& p : started) started_.insert(p.ptr());
    std::vector<std::pair<size_t, PyObject*>> missing, others;

    groups_.clear();
    size_t wanted = 0;
    for (const auto& item : groups) {
      const auto [row, params, options, rounding] = py::cast<
          std::tuple<size_t, py::list, py::tuple, std::optional<std::pair<int64_t, uint32_t>>>>(
          item);
      const OptimizerKernel& r = tables(c10::DeviceType::CPU).optimizer.data[row];
      const size_t count = options.size();
      TORCH_CHECK(count == static_cast<size_t>(count_options(r.options)), r.name, " takes ",
                  r.options);
      Group& group = groups_.emplace_back(Group{{}, params});
      group.options.row = row;
      for (size_t k = 0; k < count; ++k) {
        if (THPVariable_Check(options[k].ptr())) {
          const Tensor& t = THPVariable_Unpack(options[k].ptr());
          TORCH_CHECK(t.numel() == 1 && t.is_cuda(), r.name,
                      ": an option that is a tensor must be one number on a CUDA device");
          group.options.memory.resize(count);
          group.options.memory[k] = t;
        } else {
          group.options.values[k] = py::cast<double>(options[k]);
        }
      }
      if (rounding) {
        group.options.stochastic = true;
        std::tie(group.options.seed, group.options.step) = *rounding;
      }
      wanted += params.size();
    }
    if (hints_.size() != wanted) hints_.assign(wanted, 0);
    looked_ = false;
    std::vector<Apart> given;
    for (const auto& item : apart) given.push_back(py::cast<Apart>(item));
    std::deque<Options> read;  // with what of them is in device memory

    // From here to the end of the kernels no Python code runs, so that borrowed references hold.
    size_t k = 0;
    for (size_t number = 0; number < groups_.size(); ++number) {
      const Group& group = groups_[number];
      PyObject* params = group.params.ptr();
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i, ++k) {
        PyObject* p = PyList_GET_ITEM(params, i);
        multi_tensor_step_.expect(multi_tensor_step_.size() + kAhead);
        switch (collect(group.options, static_cast<uint32_t>(i), p, state.ptr(), hints_[k])) {
          case Found::kMissing:
            missing.emplace_back(number, p);
            break;
          case Found::kOther:
            others.emplace_back(number, p);
            break;
          case Found::kReady:
            break;
        }
      }
    }
    if (!missing.empty() || (!others.empty() && !partial)) {
      const auto list = [](const std::vector<std::pair<size_t, PyObject*>>& found) {
        py::list l;
        for (const auto& [g, p] : found)
          l.append(py::make_tuple(g, py::reinterpret_borrow<py::object>(p)));
        return l;
      };
      return py::make_tuple(list(missing), list(others));
    }
    for (const auto& [number, param, tensors, average] : given) {
      const Options* options = &groups_.at(number).options;
      if (!options->memory.empty()) {
        Options& o = read.emplace_back(*options);
        for (size_t j = 0; j < o.memory.size(); ++j)
          if (o.memory[j].defined()) o.values[j] = o.memory[j].item<double>();
        o.memory.clear();
        options = &o;
      }
      const OptimizerKernel& r = rows_.data[options->row];
      TORCH_CHECK(tensors.size() == static_cast<size_t>(2 + r.states + r.counts), r.name, ": ",
                  tensors.size(), " tensors of one parameter");
      TensorImpl* of[3 + kMaxStates] = {};
      for (size_t j = 0; j < tensors.size(); ++j) {
        of[j] = tensors[j].unsafeGetTensorImpl();
        TORCH_CHECK(plain(of[j]), r.name, ": tensor ", j,
                    " of one parameter is not an ordinary dense one");
      }
      multi_tensor_step_.add(*options, 0, fresh_.count(param.ptr()), of[0], of[1],
                             r.counts ? of[2 + r.states] : nullptr, of + 2,
                             average ? average->unsafeGetTensorImpl() : nullptr,
                             started_.count(param.ptr()) ? 1.0 : ema_weight_.value_or(0));
    }
    if (check_only) return py::none();
    const auto ownership = multi_tensor_step_.share_interpreter();
    std::optional<Tensor> scale = grad_scale;
    if (max_grad_norm && multi_tensor_step_.size() > 0) {
      const Tensor clip = multi_tensor_step_.clip(grad_scale, *max_grad_norm);
      if (!clip.defined()) return py::bool_(false);
      grad_norm = clip.select(0, 0);
      scale = clip.select(0, 1);
    }
    multi_tensor_step_.run(scale, found_inf, /*moves_versions=*/true);
    ++steps;
    return py::none();
  }
  Tensor grad_norm;   // of the last step with max_grad_norm
  int64_t steps = 0;  // that were taken. An interrupt that comes meanwhile is raised where step()
                      // returns: this tells

 private:
  enum class Found { kReady, kMissing, kOther };
  struct Flag {
    bool& up;
    explicit Flag(bool& flag) : up(flag) { up = true; }
    ~Flag() { up = false; }
  };
  struct Group {
    Options options;
    py::list params;
  };
  using Apart = std::tuple<size_t, py::object, std::vector<Tensor>, std::optional<Tensor>>;

  Found collect(const Options& options, uint32_t number, PyObject* param, PyObject* state,
                Py_ssize_t& hint) {
    if (!THPVariable_CheckExact(param)) {
      // A subclass may have a `grad` of its own; the class of Parameter hooks and buffers is for
      // Python to look at.
      return Found::kOther;
    }
    TensorImpl* p = THPVariable_Unpack(param).unsafeGetTensorImpl();
    if (!plain(p)) return Found::kOther;
    const Tensor& grad = p->grad();
    if (!grad.defined()) return Found::kReady;
    TensorImpl* g = grad.unsafeGetTensorImpl();
    if (!plain(g)) return Found::kOther;

    const OptimizerKernel& r = rows_.data[options.row];
    TensorImpl *s[kMaxStates] = {}, *counter = nullptr;
    TensorImpl* average = nullptr;
    const bool first = !fresh_.empty() && fresh_.count(param);
    if (r.states > 0 || r.counts || ema_weight_) {
      PyObject* own = state_of(state, param, hint);
      if (!own || !PyDict_Check(own) || PyDict_GET_SIZE(own) == 0) return Found::kMissing;
      Py_ssize_t at = 0;
      if (r.counts) {
        PyObject* t = value_of(own, counter_key_.ptr(), at);
        TORCH_CHECK(
            THPVariable_Check(t),
            "API has changed, `state_steps` argument must contain a list of singleton tensors");
        counter = THPVariable_Unpack(t).unsafeGetTensorImpl();
        if (!plain(counter) || (!counter->is_cpu() && counter->device() != p->device()))
          return Found::kOther;
      }
      for (int k = 0; k < r.states; ++k) {
        // Where steps are counted, a state that lacks one is broken; else it may be that there was
        // no need for one so far.
        PyObject* t = value_of(own, state_keys_[options.row][k].ptr(), at, /*optional=*/!r.counts);
        if (!t || t == Py_None) return Found::kMissing;
        if (!THPVariable_CheckExact(t)) return Found::kOther;
        s[k] = THPVariable_Unpack(t).unsafeGetTensorImpl();
        if (!plain(s[k])) return Found::kOther;
      }
      if (ema_weight_) {
        PyObject* t = PyDict_GetItemWithError(own, average_key_.ptr());
        if (!t && PyErr_Occurred()) throw py::error_already_set();
        if (!t || t == Py_None) return Found::kMissing;
        if (!THPVariable_CheckExact(t)) return Found::kOther;
        average = THPVariable_Unpack(t).unsafeGetTensorImpl();
        if (!plain(average)) return Found::kOther;
      }
    }
    // StepScalars of the step are made in one place.
    if (!options.memory.empty() && (p->is_cpu() || (counter && counter->is_cpu())))
      return Found::kOther;
    multi_tensor_step_.add(options, number, first, p, g, counter, s, average,
                           started_.count(param) ? 1.0 : ema_weight_.value_or(0));
    return Found::kReady;
  }

  // state[param], without calling the parameter's __hash__ (which is Python): entries are found
  // where they were the last time, or else by walking the dictionary once.
  PyObject* state_of(PyObject* state, PyObject* param, Py_ssize_t& hint) {
    PyObject *key, *value;
    Py_ssize_t at = hint;
    if (PyDict_Next(state, &at, &key, &value) && key == param) return value;
    if (!looked_) {
      positions_.clear();
      for (Py_ssize_t next = 0, here = 0; PyDict_Next(state, &next, &key, &value); here = next)
        positions_.emplace(key, here);
      looked_ = true;
    }
    const auto found = positions_.find(param);
    if (found == positions_.end()) return nullptr;
    hint = at = found->second;
    PyDict_Next(state, &at, &key, &value);
    return value;
  }

  // d[key], which is most often the entry at position `at`. Raises KeyError as Python does, or
  // returns null.
  static PyObject* value_of(PyObject* d, PyObject* wanted, Py_ssize_t& at, bool optional = false) {
    PyObject *key, *value;
    const Py_ssize_t before = at;
    if (PyDict_Next(d, &at, &key, &value) && key == wanted) return value;
    at = before;
    value = PyDict_GetItemWithError(d, wanted);
    if (!value) {
      if (optional && !PyErr_Occurred()) return nullptr;
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, wanted);
      throw py::error_already_set();
    }
    return value;
  }

  const KernelTable<OptimizerKernel> rows_ = tables(c10::DeviceType::CPU).optimizer;
  MultiTensorStep multi_tensor_step_;
  std::vector<Group> groups_;
  std::vector<Py_ssize_t> hints_;
  std::unordered_map<PyObject*, Py_ssize_t> positions_;
  std::unordered_set<PyObject*> fresh_, started_;
  bool looked_ = false, stepping_ = false;
  py::object counter_key_, average_key_;
  std::optional<double> ema_weight_;
  std::vector<std::vector<py::object>> state_keys_;
};

}  // namespace

void bind_optimizers(pybind11::module_& m) {
  py::class_<OptimizerStepper>(
      m, "OptimizerStepper",
      "Steps the parameters of an optimizer as they stand in its dictionaries.")
      .def(py::init<>())
      .def("step", &OptimizerStepper::step, py::arg("state"), py::arg("groups"),
           py::arg("grad_scale") = std::nullopt, py::arg("found_inf") = std::nullopt,
           py::arg("fresh") = py::list(), py::arg("started") = py::list(),
           py::arg("apart") = py::list(), py::arg("partial") = false, py::arg("check_only") = false,
           py::arg("ema_weight") = std::nullopt, py::arg("max_grad_norm") = std::nullopt)
      .def_readonly("grad_norm", &OptimizerStepper::grad_norm)
      .def_readonly("steps", &OptimizerStepper::steps);
  // name, names of the states, whether steps are counted, options as a schema writes them
  m.def("optimizer_kernels", [] {
    std::vector<std::tuple<std::string, std::string, bool, std::string>> rows;
    for (const OptimizerKernel& r : tables(c10::DeviceType::CPU).optimizer)
      rows.emplace_back(r.name, r.state_names, r.counts, r.options);
    return rows;
  });
}

}  // namespace fastops
