// The bindings: this takes an op's arguments from PyTorch through its stable ABI and hands them to the kernels.
// Compiled once per device, with FASTADV_BACKEND = cpu or cuda and FASTADV_KEY = CPU or CUDA.
//
// What users are told about wrong arguments is in fastadv/ops/checks.py; here stands only what keeps a raw op call
// from touching memory that is not its own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <map>
#include <optional>
#include <string>

#include "call.h"
#include "facts.h"
#ifdef FASTADV_CUDA
#include "cuda/ops.h"
#endif

namespace fastadv {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

std::atomic<int64_t> call_count{0};

struct DeviceId {
  int32_t type = -1, index = -1;
  explicit DeviceId(const Tensor& t) {
    aoti_torch_get_device_type(t.get(), &type);
    aoti_torch_get_device_index(t.get(), &index);
  }
  bool operator==(const DeviceId& other) const { return type == other.type && index == other.index; }
};

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Byte:
      return DType::kUInt8;
    default:
      STD_TORCH_CHECK(false, "fastadv: ", name, " has a dtype that the op does not take");
  }
}

void* stream_of(const DeviceId& device) {
#ifdef FASTADV_CUDA
  void* stream = nullptr;
  // The headers' own check of the code changed its name after PyTorch 2.11.
  const bool found = aoti_torch_get_current_cuda_stream(device.index, &stream) == AOTI_TORCH_SUCCESS;
  STD_TORCH_CHECK(found, "fastadv: PyTorch names no current stream of CUDA device ", device.index);
  return stream;
#else
  (void)device;
  return nullptr;
#endif
}

// Makes the tensors' device the current one, if it is not: PyTorch's guard takes longer than asking.
struct OnDevice {
#ifdef FASTADV_CUDA
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  explicit OnDevice(const DeviceId& device) {
    if (current_device() != device.index) guard.emplace(device.index);
  }
#else
  explicit OnDevice(const DeviceId&) {}
#endif
};

// Collects an op's tensors, then makes their layout.
class Arguments {
 public:
  explicit Arguments(const Tensor& out) : device_(out), shape_(out) { image(kOut, out, "out"); }

  void image(Slot slot, const Tensor& t, const char* name) {
    bool same = t.dim() == shape_.dim() && t.dim() <= kMaxDims && DeviceId(t) == device_;
    for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == shape_.size(d);
    STD_TORCH_CHECK(same, "fastadv: ", name, " must have out's shape, at most 64 dimensions, and its device");
    STD_TORCH_CHECK(slot == kX || t.scalar_type() != ScalarType::Byte, "fastadv: only x may be uint8");
    take(slot, t, name);
  }

  void parameter(Slot slot, double number, const Optional& t, const char* name) {
    call_.numbers[slot] = number;
    if (!t) return;
    bool fits = DeviceId(*t) == device_ && t->scalar_type() != ScalarType::Byte;
    if (t->dim() != 0) {
      fits = fits && t->dim() == shape_.dim();
      for (int64_t d = 0; fits && d < t->dim(); ++d) fits = t->size(d) == 1 || (d < 2 && t->size(d) == shape_.size(d));
    }
    STD_TORCH_CHECK(fits, "fastadv: ", name, " must be 0-dim or broadcast over x's first two dimensions");
    take(slot, *t, name);
  }

  void model_input(const Tensor& z, const Tensor& mean, const Tensor& scale) {
    image(kZ, z, "z");
    call_.channels = {mean.data_ptr(), scale.data_ptr(), mean.numel()};
    channel_type_ = mean.scalar_type();
    bool fits = mean.dim() == 0 || (shape_.dim() >= 2 && mean.numel() == shape_.size(1));
    for (const Tensor* t : {&mean, &scale})
      fits = fits && t->numel() == mean.numel() && t->scalar_type() == channel_type_ && t->is_contiguous() &&
             DeviceId(*t) == device_;
    STD_TORCH_CHECK(fits, "fastadv: mean and scale must be contiguous, 0-dim or with an element per channel");
  }

  void seed(int64_t number, const Optional& t) {
    call_.seed = static_cast<uint64_t>(number);
    if (!t) return;
    per_sample_ = t->numel() != 1;
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->is_contiguous() && DeviceId(*t) == device_ &&
                        (!per_sample_ || (t->dim() == 1 && shape_.dim() > 0 && t->numel() == shape_.size(0))),
                    "fastadv: seed must be a contiguous int64 tensor with one element or one per sample");
    call_.seeds = static_cast<const int64_t*>(t->data_ptr());
    seeds_ = {static_cast<char*>(t->data_ptr()), DType::kFloat64, t->sizes().data(), t->strides().data(),
              static_cast<int>(t->dim())};  // float64 has an int64's size
  }

  Call& call() { return call_; }

  void run(void (*kernel)(const Call&, void*)) {
    if (shape_.numel() != 0) check_results();
    ++call_count;
    if (shape_.numel() == 0) return;
    make_layout(tensors_[kX], tensors_, per_sample_, call_.layout);
    if (call_.has(kZ)) {
      STD_TORCH_CHECK(channel_type_ == (call_.any_float64() ? ScalarType::Double : ScalarType::Float),
                      "fastadv: mean and scale must be of the compute type");
      if (call_.channels.count > 1) call_.channels.inner = run_length(tensors_[kX], per_sample_ ? 1 : 0, 1);
    }
    const OnDevice there(device_);
    kernel(call_, stream_of(device_));
  }

 private:
  // out may be an operand to the letter; whatever else a result's addresses reach into is refused.
  void check_results() const {
    for (Slot slot : {kOut, kZ}) {
      const Strided& result = tensors_[slot];
      if (!result.data) continue;
      STD_TORCH_CHECK(!overlaps_itself(result), "fastadv: out or z has elements that share memory");
      bool apart = call_.seeds == nullptr || reaches_apart(result, seeds_);
      for (const Strided& t : tensors_)
        apart = apart && (!t.data || (slot == kOut ? same(result, t) : &result == &t) || reaches_apart(result, t));
      STD_TORCH_CHECK(apart, "fastadv: out or z may overlap another tensor without being the same");
    }
  }

  void take(Slot slot, const Tensor& t, const char* name) {
    tensors_[slot] = {static_cast<char*>(t.data_ptr()), dtype_of(t, name), t.sizes().data(), t.strides().data(),
                      static_cast<int>(t.dim())};
  }

  DeviceId device_;
  const Tensor& shape_;
  bool per_sample_ = false;
  ScalarType channel_type_ = ScalarType::Float;
  Strided tensors_[kSlots], seeds_;
  Call call_;
};

void random_init_op(Arguments& args, const Tensor& x, double noise, int64_t seed, double lo, double hi,
                    const Optional& noise_t, const Optional& seed_t, const Optional& lo_t, const Optional& hi_t) {
  args.image(kX, x, "x");
  args.parameter(kNoise, noise, noise_t, "noise");
  args.parameter(kLo, lo, lo_t, "clip[0]");
  args.parameter(kHi, hi, hi_t, "clip[1]");
  args.seed(seed, seed_t);
  args.run(random_init);
}

void fgsm_step_op(Arguments& args, const Tensor& x, const Tensor& grad, bool project, double alpha, double eps,
                  double noise, int64_t seed, double lo, double hi, const Optional& alpha_t, const Optional& eps_t,
                  const Optional& noise_t, const Optional& seed_t, const Optional& lo_t, const Optional& hi_t) {
  args.image(kX, x, "x");
  args.image(kGrad, grad, "grad");
  args.parameter(kEps, eps, eps_t, "eps");
  args.parameter(kAlpha, alpha, alpha_t, "alpha");
  args.parameter(kNoise, noise, noise_t, "noise");
  args.parameter(kLo, lo, lo_t, "clip[0]");
  args.parameter(kHi, hi, hi_t, "clip[1]");
  args.call().has_noise = noise != 0 || noise_t.has_value();
  if (args.call().has_noise) args.seed(seed, seed_t);
  args.call().project = project;
  args.run(fgsm_step);
}

void pgd_step_op(Arguments& args, const Tensor& x_adv, const Tensor& grad, const Tensor& x, double alpha, double eps,
                 double lo, double hi, const Optional& alpha_t, const Optional& eps_t, const Optional& lo_t,
                 const Optional& hi_t) {
  args.image(kX, x, "x");
  args.image(kIterate, x_adv, "x_adv");
  args.image(kGrad, grad, "grad");
  args.parameter(kAlpha, alpha, alpha_t, "alpha");
  args.parameter(kEps, eps, eps_t, "eps");
  args.parameter(kLo, lo, lo_t, "clip[0]");
  args.parameter(kHi, hi, hi_t, "clip[1]");
  args.run(pgd_step);
}

// The two forms of a step, of what takes its arguments but for the results.
template <auto kStep>
struct Op;
template <class... Rest, void (*kStep)(Arguments&, Rest...)>
struct Op<kStep> {
  static void alone(const Tensor& out, Rest... rest) {
    Arguments args(out);
    kStep(args, rest...);
  }
  static void with_z(const Tensor& out, const Tensor& z, const Tensor& mean, const Tensor& scale, Rest... rest) {
    Arguments args(out);
    args.model_input(z, mean, scale);
    kStep(args, rest...);
  }
};

void philox_op(const Tensor& out, const Tensor& seed, const Tensor& index, const Tensor& restart, int64_t word3) {
  const DeviceId device(index);
  const int64_t n = index.numel();
  bool fits = out.numel() == 4 * n;
  for (const Tensor* t : {&seed, &index, &restart, &out})
    fits = fits && t->scalar_type() == ScalarType::Long && t->is_contiguous() && DeviceId(*t) == device &&
           (t == &out || t->numel() == n);
  STD_TORCH_CHECK(fits, "fastadv: philox takes contiguous int64 tensors of one size");
  ++call_count;
  if (n == 0) return;
  const OnDevice there(device);
  auto data = [](const Tensor& t) { return static_cast<int64_t*>(t.data_ptr()); };
  philox_words(n, data(seed), data(index), data(restart), static_cast<uint32_t>(word3), data(out), stream_of(device));
}

}  // namespace
}  // namespace fastadv

#define FASTADV_JOIN(a, b) a##b
#define FASTADV_MODULE(backend) FASTADV_JOIN(_, backend)
#define FASTADV_TEXT(a) FASTADV_TEXT_(a)
#define FASTADV_TEXT_(a) #a

#define FASTADV_STEP(name)                                                                                   \
  library.impl(#name "." FASTADV_TEXT(FASTADV_BACKEND), TORCH_BOX(&fastadv::Op<fastadv::name##_op>::alone)); \
  library.impl(#name "_z." FASTADV_TEXT(FASTADV_BACKEND), TORCH_BOX(&fastadv::Op<fastadv::name##_op>::with_z))

STABLE_TORCH_LIBRARY_IMPL(fastadv, FASTADV_KEY, library) {
  FASTADV_STEP(random_init);
  FASTADV_STEP(fgsm_step);
  FASTADV_STEP(pgd_step);
  library.impl("philox." FASTADV_TEXT(FASTADV_BACKEND), TORCH_BOX(&fastadv::philox_op));
}

PYBIND11_MODULE(FASTADV_MODULE(FASTADV_BACKEND), module) {
  module.doc() = "Native kernels; importing this registers them with torch. Here is what is not an op.";
  module.def("calls", [] { return fastadv::call_count.load(); }, "Kernel calls in this process.");
  fastadv::add_facts(module);
}
