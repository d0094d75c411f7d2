// One step of many parameters: checked as a whole, then changed. Knows tensors and kernels; no
// formula, no option by name, and not where the tensors come from.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../../kernels/optimizer.h"
#include "gradient_norm.h"

namespace fastops {

// What a group of parameters is stepped with.
struct StepOptions {
  size_t kernel = 0;  // its place in the table
  double values[kMaxOptions] = {};
  std::vector<at::Tensor>
      memory;  // per option: a tensor on a CUDA device that holds it instead; empty where none does
  bool stochastic =
      false;  // rounding to bfloat16, with this seed and, where steps are not counted, step
  int64_t seed = 0;
  uint32_t step = 0;
};

// The tensors of one parameter.
struct StepTensors {
  c10::TensorImpl *p = nullptr, *g = nullptr;
  c10::TensorImpl* states[kMaxStates] = {};
  c10::TensorImpl* scalar_states[kMaxScalarStates] = {};
  c10::TensorImpl* average = nullptr;  // or null
};

// add() checks and collects, run() changes.
class MultiTensorStep {
 public:
  void clear();
  size_t size() const { return entries_.size(); }

  // `options` and the tensors must stay where they are until run() is over; see
  // share_interpreter(). `number`: of the parameter in its group, for the rounding. `first`: its
  // states have just been made. `weight`: of the parameter in its average.
  void add(const StepOptions& options, uint32_t number, bool first, const StepTensors& tensors,
           double weight = 0);

  // Asks for what add() will look at when it is called for the k-th time, if this step is like the
  // last.
  void expect(size_t k) const;

  // Lets other threads use the interpreter while kernels run on much memory: call it before clip()
  // and run(), with the interpreter's lock held. Those threads may drop or replace any of the
  // tensors, so that they and their memory are owned until the result is destroyed. Where working
  // copies are needed, the lock is held throughout, since the tensors are read after the kernels.
  class Ownership {
   public:
    explicit Ownership(MultiTensorStep& step);
    Ownership(const Ownership&) = delete;
    ~Ownership();

   private:
    MultiTensorStep& step_;
  };
  [[nodiscard]] Ownership share_interpreter();

  // As GradientNorm::clip(), of the gradients. Undefined where not all of them are dense and on one
  // device, with grad_scale.
  at::Tensor clip(const std::optional<at::Tensor>& grad_scale, double max_norm);

  // grad_scale and found_inf as torch.amp.GradScaler hands them over. Leaves version counters alone
  // on request, where the dispatcher's ADInplaceOrView key sees to them. Where this throws,
  // parameters that were not stepped have their scalar states from before.
  void run(const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
           bool moves_versions);

 private:
  static constexpr size_t kNoBucket = SIZE_MAX;
  struct Entry {
    StepTensors t;
    const StepOptions* options;
    uint32_t number;
    int64_t n;
    c10::ScalarType dtype, state_dtype;
    c10::Device device;
    bool first;
    bool flat = false;        // p, g, states and average share one dense memory order
    bool g_is_alone = false;  // on its storage
    bool on_device =
        false;             // a scalar state or an option is: the scalars of the step are made there
    bool counted = false;  // in this run
    unsigned in_double = 0;     // bit k: scalar state k is
    size_t bucket = kNoBucket;  // that steps it in this run
    double weight;              // of the parameter in its average
    void* p_data = nullptr;
    const void* g_data = nullptr;
    void* s_data[kMaxStates] = {};
    void* average_data = nullptr;
    void* scalar_data[kMaxScalarStates] = {};
    double scalars_before[kMaxScalarStates] = {};  // this run, where it is counted

    void find_memory();
    // What is written besides the parameter and the scalar states.
    template <class F>
    void each_state(F f) {
      for (int k = 0; k < kMaxStates && t.states[k]; ++k) f(t.states[k], s_data[k]);
      if (t.average) f(t.average, average_data);
    }
    template <class F>
    void each_state(F f) const {
      for (int k = 0; k < kMaxStates && t.states[k]; ++k) f(t.states[k], s_data[k]);
      if (t.average) f(t.average, average_data);
    }
    template <class F>
    void each_scalar_state(F f) const {
      for (int k = 0; k < kMaxScalarStates && t.scalar_states[k]; ++k)
        f(k, t.scalar_states[k], scalar_data[k]);
    }
    double read_scalar(int k) const;
    void write_scalar(int k, double value) const;
  };
  struct Bucket {  // what one kernel call can do
    size_t kernel;
    c10::Device device;
    c10::ScalarType dtype, state_dtype;
    bool stochastic, on_device;
    unsigned in_double;  // where on_device, as the next
    const StepOptions* options;
    c10::TensorImpl* any = nullptr;  // of its tensors
    std::vector<OptimizerTensor> tensors = {};
    std::vector<OptimizerNoise> noise = {};  // where stochastic; those below where on_device
    std::vector<void*> scalar_states[kMaxScalarStates] = {};
    std::vector<unsigned char> first = {};
    bool launched = false;

    bool takes(const Entry& e) const;
    void clear();
  };
  struct Scaling {
    std::optional<at::Tensor> grad_scale, found_inf;  // for the kernels to read
  };
  struct Copy {
    at::Tensor original, work;
    c10::TensorImpl** slot;  // in an entry: points to `work` until scatter()
    const Entry* entry;
    bool written;
  };
  struct Range {
    const char* begin;
    int64_t bytes;
  };

  void check_writable(const char* what, const c10::TensorImpl* t, const Entry& e) const;
  void check_like_parameter(const char* what, const c10::TensorImpl* t, const Entry& e) const;
  void check_scalar_states(Entry& e) const;
  bool overlapping();
  bool skips_on_device() const;

  void run(size_t begin, size_t end, const Scaling& scaling, bool moves_versions);
  void gather(size_t begin, size_t end);
  void fill(size_t begin, size_t end);
  void launch(const Scaling& scaling);
  void scatter();
  Bucket& bucket_for(const Entry& e, Bucket* guess);
  bool stepped(const Entry& e) const;
  void bump_versions(size_t begin, size_t end) const;

  std::vector<Entry> entries_, before_;  // of this step and of the last
  int64_t elements_ = 0;
  bool all_flat_ = true;
  std::vector<Bucket> buckets_;
  std::vector<double> scalars_;
  std::vector<Copy> copies_;
  std::vector<int64_t> order_;
  std::vector<Range> written_, sorted_;
  bool overlapping_ = false;
  GradientNorm norm_;
  bool releases_interpreter_ = false;
  std::vector<at::Tensor> owned_;
  std::vector<c10::Storage> owned_memory_;
};

}  // namespace fastops
