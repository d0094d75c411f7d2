// A CUDA device made of this process's memory, for running csrc/torch as it is: tensors of device
// type CUDA, a guard and streams that torch and csrc/torch see, and torch's own CUDA ops, each of
// which is run by its CPU kernel on the same memory. Our kernels come from the emulator. Linked
// with the objects of fastops._C; see device.py.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "../../csrc/emulation/block.h"
#include "../../csrc/emulation/memory.h"

namespace py = pybind11;
using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::DispatchKey;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

namespace fastops::emulation {
namespace {

constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex current = 0;
thread_local c10::StreamId streams[kDevices] = {};
bool sync_is_an_error = false;
Graph* capturing = nullptr;
std::vector<Launched> places;

// As c10::impl::FakeGuardImpl, with streams that may be captured.
struct Guard : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return {DeviceType::CUDA, current}; }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.is_cuda() && d.index() >= 0 && d.index() < kDevices,
                "invalid device ordinal: ", d);
    current = d.index();
  }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  Device exchangeDevice(Device d) const override {
    const Device before = getDevice();
    setDevice(d);
    return before;
  }
  c10::Stream stream(Device d, c10::StreamId id) const {
    return c10::Stream(c10::Stream::UNSAFE, d, id);
  }
  c10::Stream getStream(Device d) const override {
    if (!d.has_index()) d = getDevice();
    return stream(d, streams[d.index()]);
  }
  c10::Stream getDefaultStream(Device d) const override { return stream(d, 0); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    return stream(s.device(), std::exchange(streams[s.device_index()], s.id()));
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  bool isStreamCapturing(const c10::Stream&) const override { return capturing; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
const Guard guard;

// ------------------------------------------------------------------------------------------------
// tensors

// The memory of `t` as a tensor of another device.
Tensor alias(const Tensor& t, Device device) {
  const c10::Storage& storage = t.storage();
  c10::DataPtr data(
      const_cast<void*>(storage.data()), new c10::Storage(storage),
      [](void* p) { delete static_cast<c10::Storage*>(p); }, device);
  auto* allocator = device.is_cpu() ? c10::GetCPUAllocator()
                                    : nullptr;  // what torch resizes, it resizes on the host
  c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator,
                    allocator);
  const auto key = device.is_cuda() ? DispatchKey::CUDA : DispatchKey::CPU;
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(same), c10::DispatchKeySet(key),
                                                         t.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (t.is_conj()) made._set_conj(true);
  if (t.is_neg()) made._set_neg(true);
  return made;
}

// ------------------------------------------------------------------------------------------------
// torch's ops

void waits(const OperatorHandle& op) {
  TORCH_CHECK(!sync_is_an_error, "called a synchronizing CUDA operation: ", op.schema().name());
  TORCH_CHECK(!capturing, "operation not permitted when stream is capturing: ", op.schema().name());
}

bool waits_always(const std::string& name) {
  for (const char* each : {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select",
                           "aten::equal", "aten::_unique2", "aten::repeat_interleave"})
    if (name == each) return true;
  return false;
}

// Runs a torch op on device tensors by its CPU kernel.
void on_the_host(const OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  std::vector<std::pair<Tensor, Tensor>> aliases;  // original, on the host
  std::optional<Device> device;
  const auto to_host = [&](const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    device = t.device();
    aliases.emplace_back(t, alias(t, c10::kCPU));
    return aliases.back().second;
  };
  Stack arguments = torch::jit::pop(*stack, schema.arguments().size());
  bool host_tensor = false, blocks = true;
  for (size_t i = 0; i < arguments.size(); ++i) {
    IValue& v = arguments[i];
    if (v.isTensor()) {
      host_tensor |= v.toTensor().defined() && v.toTensor().is_cpu();
      v = to_host(v.toTensor());
    } else if (v.isTensorList()) {
      auto list = v.toTensorVector();
      for (Tensor& t : list) t = to_host(t);
      v = list;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : v.toOptionalTensorList())
        list.push_back(t ? std::optional<Tensor>(to_host(*t)) : t);
      v = list;
    } else if (v.isDevice() && v.toDevice().is_cuda()) {
      device = v.toDevice();
      if (!device->has_index()) device = guard.getDevice();
      v = Device(c10::kCPU);
    } else if (schema.arguments()[i].name() == "pin_memory") {
      v = IValue();
    } else if (schema.arguments()[i].name() == "non_blocking" && v.isBool()) {
      blocks = !v.toBool();
    }
  }
  if (waits_always(schema.name()) || (schema.name() == "aten::copy_" && host_tensor && blocks))
    waits(op);
  Stack results = arguments;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(&results);
  }
  if (capturing) {
    capturing->work.push_back([op, arguments, results] {
      const at::AutoDispatchBelowADInplaceOrView below;
      Stack again = arguments;
      op.callBoxed(&again);
      for (size_t i = 0; i < again.size(); ++i)
        if (again[i].isTensor() && !again[i].toTensor().is_same(results[i].toTensor()))
          results[i].toTensor().copy_(again[i].toTensor());
      return true;
    });
  }
  for (const auto& [original, host] : aliases) {  // that an op resized
    if (host.sizes() == original.sizes() && host.data_ptr() == original.data_ptr()) continue;
    auto* impl = original.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(alias(host, original.device()).storage());
    impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }
  const auto from_host = [&](const Tensor& t) {
    if (!t.defined()) return t;
    for (const auto& [original, host] : aliases)
      if (host.is_same(t)) return original;
    return alias(t, device.value_or(guard.getDevice()));
  };
  for (IValue& v : results) {
    if (v.isTensor()) {
      v = from_host(v.toTensor());
    } else if (v.isTensorList()) {
      auto list = v.toTensorVector();
      for (Tensor& t : list) t = from_host(t);
      v = list;
    }
    stack->push_back(std::move(v));
  }
}

// What only looks at sizes and strides runs as it is.
bool is_a_view(const std::string& name) {
  for (const char* each : {"as_strided", "view", "_reshape_alias", "unfold", "set_", "view_as_real",
                           "view_as_complex"})
    if (name == std::string("aten::") + each) return true;
  return false;
}

// What torch asks about CUDA without a tensor at hand. Its generators are the CPU's.
struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return guard.deviceCount(); }
  c10::DeviceIndex getCurrentDevice() const override { return guard.getDevice().index(); }
  c10::DeviceIndex current_device() const override { return guard.getDevice().index(); }
  int getNumGPUs() const override { return guard.deviceCount(); }
  bool isPinnedPtr(const void*) const override { return false; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
};

void install() {
  // torch made its hooks while it was imported and has handed them out: they get the virtual
  // functions of ours.
  static const Hooks hooks({});
  std::memcpy(const_cast<void*>(static_cast<const void*>(&at::detail::getCUDAHooks())),
              static_cast<const void*>(&hooks), sizeof(void*));
  c10::impl::registerDeviceGuard(DeviceType::CUDA, &guard);
  launched = &places;
  current_device = [] { return static_cast<int>(guard.getDevice().index()); };
  static auto& handles = *new std::vector<c10::RegistrationHandleRAII>;  // for good
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findSchema(name);
    if (!op || name.name.compare(0, 6, "aten::") != 0 || is_a_view(name.name)) continue;
    if (!op->hasKernelForDispatchKey(DispatchKey::CUDA) && name.name != "aten::copy_") continue;
    handles.push_back(dispatcher.registerImpl(
        name, DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&on_the_host>(),
        std::nullopt, nullptr, "tests/emulation/device.cpp"));
  }
}

}  // namespace
}  // namespace fastops::emulation

// ------------------------------------------------------------------------------------------------
// Python

extern "C" __attribute__((visibility("hidden"))) c10::StreamId fastops_current_stream(
    c10::DeviceIndex device) {
  using namespace fastops::emulation;
  return guard.getStream(device < 0 ? guard.getDevice() : Device(DeviceType::CUDA, device)).id();
}

PYBIND11_MODULE(_device, m) {
  using namespace fastops::emulation;
  m.def("install", &install);
  m.def("device_count", [] { return static_cast<int>(kDevices); });
  m.def("current_device", [] { return static_cast<int>(guard.getDevice().index()); });
  m.def("set_device", [](int device) {
    guard.setDevice(Device(DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)));
  });
  m.def("exchange_stream", [](int device, int64_t id) {
    const Device of(DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
    return guard.exchangeStream(c10::Stream(c10::Stream::UNSAFE, of, id)).id();
  });
  m.def("set_sync_is_an_error", [](bool on) { sync_is_an_error = on; });
  // (device, stream) of every launch since the last call
  m.def("launches", [] {
    const auto found = std::exchange(places, {});
    std::vector<std::pair<int, uintptr_t>> pairs;
    for (const Launched& l : found)
      pairs.emplace_back(l.device, reinterpret_cast<uintptr_t>(l.stream));
    return pairs;
  });
  py::class_<Graph>(m, "Graph")
      .def(py::init<>())
      .def("begin", [](Graph& g) { graph = capturing = &g; })
      .def("end", [](Graph&) { graph = capturing = nullptr; })
      .def("replay",
           [](const Graph& g) {
             for (const auto& work : g.work)
               TORCH_CHECK(work(), "a launch in a graph failed: ", machine.error);
           })
      .def("__len__", [](const Graph& g) { return g.work.size(); });
  m.def("capturing", [] { return capturing != nullptr; });
}
