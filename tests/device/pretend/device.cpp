// A device that computes on the CPU and is as strict as a real one (tests/pretend/__init__.py).
//
// Every tensor of it has memory of the CPU. A kernel for all operators gives the CPU's kernels tensors of the CPU over
// that same memory, and gives what they return back as tensors of the device. So the numbers are the CPU's, but tensors
// of both don't mix, and everything for which a program would wait for a real device is noted.

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <set>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
const c10::Device device{kDevice, 0};

// What a storage of the device keeps as its context: the storage of the CPU whose memory it shows.
struct Memory {
  c10::Storage cpu;
};

void release(void* memory) {
  delete static_cast<Memory*>(memory);
}

c10::DataPtr pointer_to(c10::Storage cpu) {
  void* data = cpu.mutable_data();
  return {data, new Memory{std::move(cpu)}, &release, device};
}

c10::Storage on_device(const c10::Storage& cpu) {
  return c10::Storage(
      c10::Storage::use_byte_size_t(), cpu.nbytes(), pointer_to(cpu), c10::GetAllocator(kDevice), true);
}

c10::Storage on_cpu(const c10::Storage& storage) {
  return static_cast<Memory*>(storage.data_ptr().get_context())->cpu;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    return pointer_to(c10::Storage(c10::Storage::use_byte_size_t(), n, c10::GetAllocator(c10::kCPU), true));
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, size_t n) const override {
    default_copy_data(to, from, n);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator);

bool is_here(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kDevice;
}

at::Tensor over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number())
    made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

at::Tensor to_cpu(const at::Tensor& tensor) {
  return is_here(tensor) ? over(on_cpu(tensor.storage()), c10::DispatchKey::CPU, tensor) : tensor;
}

// The tensor of the device for one of the CPU: over the storage of an argument if the operator returned a view of it.
at::Tensor to_device(const at::Tensor& tensor, const std::vector<at::Tensor>& given) {
  if (!tensor.defined() || !tensor.device().is_cpu())
    return tensor;
  for (const auto& argument : given)
    if (on_cpu(argument.storage()).is_alias_of(tensor.storage()))
      return over(argument.storage(), c10::DispatchKey::PrivateUse1, tensor);
  return over(on_device(tensor.storage()), c10::DispatchKey::PrivateUse1, tensor);
}

// An operator may have given a tensor that it writes to another size, and memory to go with it.
void follow(const at::Tensor& tensor, const at::Tensor& cpu) {
  auto* impl = tensor.unsafeGetTensorImpl();
  if (!tensor.sizes().equals(cpu.sizes()) || !tensor.strides().equals(cpu.strides()))
    impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  auto storage = tensor.storage();
  if (storage.data() != cpu.storage().data() || storage.nbytes() != cpu.storage().nbytes()) {
    storage.set_nbytes(cpu.storage().nbytes());
    storage.set_data_ptr(pointer_to(cpu.storage()));
  }
}

std::atomic<int64_t> kernels{0};

int64_t take_kernels() {
  return kernels.exchange(0);
}

// As on Apple's MPS.
std::atomic<bool> without_float64{false};

void forbid_float64(bool on) {
  without_float64 = on;
}

// A view computes nothing.
bool is_view(const c10::FunctionSchema& schema) {
  const auto& returns = schema.returns();
  return !returns.empty() && returns[0].alias_info() != nullptr && !returns[0].alias_info()->isWrite();
}

std::mutex waits_lock;
std::vector<std::string> waits;

void note_wait(const std::string& what) {
  const std::lock_guard<std::mutex> guard(waits_lock);
  waits.push_back(what);
}

std::vector<std::string> take_waits() {
  const std::lock_guard<std::mutex> guard(waits_lock);
  return std::exchange(waits, {});
}

// Operators whose result has a size, or a value, that the program has to know before it can go on.
const std::set<std::string> kWaiting{
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave", "aten::bincount"};
const std::set<std::string> kIndexing{"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

struct Arguments {
  const std::string& name;
  std::vector<at::Tensor> here; // those of the device
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs; // and over the same memory those of the CPU

  at::Tensor operator()(const at::Tensor& tensor) {
    if (!tensor.defined())
      return tensor;
    if (!is_here(tensor)) {
      const bool index = kIndexing.count(name) && !c10::isFloatingType(tensor.scalar_type());
      TORCH_CHECK(
          tensor.dim() == 0 || index,
          "Expected all tensors to be on the same device, but `", name, "` was given tensors on ", device, " and one of shape ",
          tensor.sizes(), " on ", tensor.device());
      if (tensor.dim() > 0)
        note_wait(name + " (index of the CPU)");
      return tensor;
    }
    if (kIndexing.count(name) && tensor.scalar_type() == at::kBool && !here.empty())
      note_wait(name + " (truth values)");
    here.push_back(tensor);
    pairs.emplace_back(tensor, to_cpu(tensor));
    return pairs.back().second;
  }

  at::Tensor original(const at::Tensor& cpu) const {
    for (const auto& pair : pairs)
      if (pair.second.is_same(cpu))
        return pair.first;
    return to_device(cpu, here);
  }
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto n_arguments = schema.arguments().size();
  const auto first = stack->size() - n_arguments;
  Arguments arguments{schema.name(), {}, {}};
  kernels += !is_view(schema);
  if (kWaiting.count(schema.name()))
    note_wait(schema.name());
  for (size_t i = first; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = arguments(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector())
        list.push_back(arguments(tensor));
      value = c10::IValue(c10::List<at::Tensor>(list));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector())
        list.push_back(tensor ? std::optional<at::Tensor>(arguments(*tensor)) : std::nullopt);
      value = c10::IValue(list);
    } else if (value.isDevice() && value.toDevice().type() == kDevice) {
      value = c10::IValue(c10::Device(c10::kCPU));
    } else if (value.isGenerator()) {
      TORCH_CHECK(
          value.toGenerator().device().type() == kDevice, "Expected a '", device, "' device type for generator but found '",
          value.toGenerator().device(), "' in `", schema.name(), "`");
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  if (without_float64)
    for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
      TORCH_CHECK_TYPE(
          !(*stack)[i].isTensor() || !(*stack)[i].toTensor().defined() || (*stack)[i].toTensor().scalar_type() != at::kDouble,
          "The device has no float64, which `", schema.name(), "` would return");
  for (const auto& pair : arguments.pairs)
    follow(pair.first, pair.second);
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = arguments.original(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector())
        list.push_back(arguments.original(tensor));
      value = c10::IValue(c10::List<at::Tensor>(list));
    }
  }
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  ++kernels;
  if (is_here(source) != is_here(target) && !non_blocking)
    note_wait(is_here(source) ? "copy to the CPU" : "copy from the CPU");
  to_cpu(target).copy_(to_cpu(source));
  return target;
}

at::Tensor& set_storage(
    at::Tensor& tensor, c10::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  std::vector<int64_t> strides(stride.begin(), stride.end());
  if (strides.empty()) {
    int64_t next = 1;
    strides.resize(size.size());
    for (size_t i = size.size(); i-- > 0; next *= size[i])
      strides[i] = next;
  }
  impl->set_sizes_and_strides(size, strides, offset);
  return tensor;
}

at::Tensor& set_whole_storage(at::Tensor& tensor, c10::Storage storage) {
  const auto n = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return set_storage(tensor, std::move(storage), 0, {n}, {});
}

at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  ++kernels;
  const auto b = bias ? std::optional<at::Tensor>(to_cpu(*bias)) : std::nullopt;
  return to_device(
      at::convolution(to_cpu(input), to_cpu(weight), b, stride, padding, dilation, transposed, output_padding, groups), {});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  ++kernels;
  const std::vector<int64_t> bias_sizes{transposed ? weight.size(1) * groups : weight.size(0)};
  auto [a, b, c] = at::convolution_backward(
      to_cpu(gradient), to_cpu(input), to_cpu(weight), bias_sizes, stride, padding, dilation, transposed, output_padding,
      groups, wanted);
  return {to_device(a, {}), to_device(b, {}), to_device(c, {})};
}

// The device draws from the CPU's random numbers.
struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetAllocator(c10::kCPU);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    auto cpu = on_cpu(storage);
    c10::Storage larger(c10::Storage::use_byte_size_t(), n, c10::GetAllocator(c10::kCPU), true);
    std::memcpy(larger.mutable_data(), cpu.data(), std::min(n, cpu.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr(pointer_to(larger));
    storage.unsafeGetStorageImpl()->set_nbytes(n);
  }
};

// Cells of recurrent layers, which devices have in one kernel. Gates are kept as they are after their activation.
using Optional = std::optional<at::Tensor>;

at::Tensor with_bias(const at::Tensor& gates, const Optional& bias) {
  return bias && bias->defined() ? gates + *bias : gates;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(
    const at::Tensor& from_input, const at::Tensor& from_hidden, const at::Tensor& cell, const Optional& input_bias,
    const Optional& hidden_bias) {
  const auto gates = (with_bias(from_input, input_bias) + with_bias(from_hidden, hidden_bias)).chunk(4, 1);
  const auto i = gates[0].sigmoid(), f = gates[1].sigmoid(), g = gates[2].tanh(), o = gates[3].sigmoid();
  const auto next = f * cell + i * g;
  return {o * next.tanh(), next, at::cat({i, f, g, o}, 1)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_backward(
    const Optional& of_hidden, const Optional& of_cell, const at::Tensor& cell, const at::Tensor& next,
    const at::Tensor& kept, bool has_bias) {
  const auto gates = kept.chunk(4, 1);
  const auto &i = gates[0], &f = gates[1], &g = gates[2], &o = gates[3];
  const auto hidden = of_hidden && of_hidden->defined() ? *of_hidden : at::zeros_like(next);
  const auto size = next.tanh();
  auto state = hidden * o * (1 - size * size);
  if (of_cell && of_cell->defined())
    state = state + *of_cell;
  const auto of_gates = at::cat(
      {state * g * i * (1 - i), state * cell * f * (1 - f), state * i * (1 - g * g), hidden * size * o * (1 - o)}, 1);
  return {of_gates, state * f, has_bias ? of_gates.sum(0) : at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor> gru_cell(
    const at::Tensor& from_input, const at::Tensor& from_hidden, const at::Tensor& hidden, const Optional& input_bias,
    const Optional& hidden_bias) {
  const auto a = with_bias(from_input, input_bias).chunk(3, 1), b = with_bias(from_hidden, hidden_bias).chunk(3, 1);
  const auto r = (a[0] + b[0]).sigmoid(), z = (a[1] + b[1]).sigmoid(), n = (a[2] + r * b[2]).tanh();
  return {n + z * (hidden - n), at::cat({r, z, n, hidden, b[2]}, 1)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> gru_cell_backward(
    const at::Tensor& of_hidden, const at::Tensor& kept, bool has_bias) {
  const auto parts = kept.chunk(5, 1);
  const auto &r = parts[0], &z = parts[1], &n = parts[2], &hidden = parts[3], &from_hidden = parts[4];
  const auto of_n = of_hidden * (1 - z) * (1 - n * n), of_z = of_hidden * (hidden - n) * z * (1 - z);
  const auto of_r = of_n * from_hidden * r * (1 - r);
  const auto a = at::cat({of_r, of_z, of_n}, 1), b = at::cat({of_r, of_z, of_n * r}, 1);
  return {a, b, of_hidden * z, has_bias ? a.sum(0) : at::Tensor(), has_bias ? b.sum(0) : at::Tensor()};
}

// All work is done when it is asked for: there is nothing that streams and events could wait for.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<kDevice> {
  c10::Device getDevice() const override {
    return device;
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return device;
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getNewStream(c10::Device, int) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

} // namespace

TORCH_LIBRARY(pretend_device, library) {
  library.def("forbid_float64(bool on) -> ()", &forbid_float64);
  library.def("take_kernels() -> int", &take_kernels);
  library.def("take_waits() -> str[]", &take_waits);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("_copy_from", &copy_from);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("_thnn_fused_lstm_cell", &lstm_cell);
  library.impl("_thnn_fused_lstm_cell_backward_impl", &lstm_cell_backward);
  library.impl("_thnn_fused_gru_cell", &gru_cell);
  library.impl("_thnn_fused_gru_cell_backward", &gru_cell_backward);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
}

// Autocast as on CUDA.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define SINGLE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define SINGLE_RESULT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(SINGLE)
  AT_FORALL_FP32_SET_OPT_DTYPE(SINGLE_RESULT)
  AT_FORALL_PROMOTE(WIDEST)
}

static const bool registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::register_privateuse1_backend("pretend");
  return true;
}();
