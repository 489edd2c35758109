// Chooses and launches the kernels.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels.cuh"
#include "ops.h"

namespace fastadv {
namespace {

struct FlatEntry {
  Kind kind;
  bool project;
  DType x, grad;
  void (*kernel)(Flat);
  void (*with_z)(FlatWithZ);
  const char* name;
};

// The combinations worth a kernel of their own: x, x_adv and out of one type (float for uint8), grads as training
// makes them. A row here is all that another one takes.
#define FASTADV_ROW(kind, project, X, x, G, g, name)                                                   \
  FlatEntry {                                                                                          \
    Kind::kind, project, DType::k##x, DType::k##g, vectorised_kernel<Kind::kind, project, X, G, Flat>, \
        vectorised_kernel<Kind::kind, project, X, G, FlatWithZ>, name " " #x " grad " #g               \
  }
#define FASTADV_STEP_ROWS(X, x, G, g)                                                                 \
  FASTADV_ROW(kPgd, true, X, x, G, g, "pgd_step"), FASTADV_ROW(kFgsm, true, X, x, G, g, "fgsm_step"), \
      FASTADV_ROW(kFgsm, false, X, x, G, g, "fgsm_step free"),                                        \
      FASTADV_ROW(kFgsmFromNoise, true, X, x, G, g, "fgsm_step noise"),                               \
      FASTADV_ROW(kFgsmFromNoise, false, X, x, G, g, "fgsm_step noise free")
#define FASTADV_INIT_ROW(X, x) FASTADV_ROW(kRandomInit, true, X, x, float, Float32, "random_init")

const FlatEntry kFlat[] = {
    FASTADV_INIT_ROW(float, Float32),
    FASTADV_INIT_ROW(Half, Float16),
    FASTADV_INIT_ROW(BFloat16, BFloat16),
    FASTADV_INIT_ROW(uint8_t, UInt8),
    FASTADV_STEP_ROWS(float, Float32, float, Float32),
    FASTADV_STEP_ROWS(float, Float32, Half, Float16),
    FASTADV_STEP_ROWS(float, Float32, BFloat16, BFloat16),
    FASTADV_STEP_ROWS(Half, Float16, Half, Float16),
    FASTADV_STEP_ROWS(Half, Float16, float, Float32),
    FASTADV_STEP_ROWS(BFloat16, BFloat16, BFloat16, BFloat16),
    FASTADV_STEP_ROWS(BFloat16, BFloat16, float, Float32),
    FASTADV_STEP_ROWS(uint8_t, UInt8, float, Float32),
    FASTADV_STEP_ROWS(uint8_t, UInt8, Half, Float16),
    FASTADV_STEP_ROWS(uint8_t, UInt8, BFloat16, BFloat16),
};

struct AnyEntry {
  Kind kind;
  void (*in_float)(Call, Dividers);
  void (*in_double)(Call, Dividers);
  void (*in_float_with_z)(Call, DividersWithZ);
  void (*in_double_with_z)(Call, DividersWithZ);
  const char* name;
};
#define FASTADV_ANY(kind, D) strided_kernel<Kind::kind, float, D>, strided_kernel<Kind::kind, double, D>
#define FASTADV_ANY_ROW(kind, name) {Kind::kind, FASTADV_ANY(kind, Dividers), FASTADV_ANY(kind, DividersWithZ), name}
const AnyEntry kAny[] = {
    FASTADV_ANY_ROW(kRandomInit, "random_init any"),
    FASTADV_ANY_ROW(kFgsm, "fgsm_step any"),
    FASTADV_ANY_ROW(kFgsmFromNoise, "fgsm_step noise any"),
    FASTADV_ANY_ROW(kPgd, "pgd_step any"),
};

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call of another library would find it
  throw std::runtime_error(std::string("fastadv: ") + what + ": " + cudaGetErrorString(error));
}

// Whether the kernel waits for the one ahead of it: where its code is for compute capability 9.0, which a newer device
// may have made of PTX for 8.0. The flat kernels are all compiled alike: one is asked, once a device.
bool waits_for_predecessor(const void* kernel) {
  constexpr int kDevices = 64;
  static std::atomic<int> versions[kDevices];  // of the PTX that the code was made of; 0: not asked yet
  const int device = current_device();
  int version = device < kDevices ? versions[device].load(std::memory_order_relaxed) : 0;
  if (version == 0) {
    cudaFuncAttributes a{};
    check(cudaFuncGetAttributes(&a, kernel), "attributes");
    version = a.ptxVersion;
    if (device < kDevices) versions[device].store(version, std::memory_order_relaxed);
  }
  return version >= 90;
}

// Whether a launch may begin while the kernel ahead of it ends: only what can wait for that by itself.
enum class Overlap : bool { kNo, kYes };

// A launch as a plain function call: tests/emulated_cuda runs the same lines without a GPU.
template <Overlap kOverlap = Overlap::kNo, class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), dim3 grid, void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = kOverlap == Overlap::kYes && waits_for_predecessor(reinterpret_cast<const void*>(kernel));
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

constexpr int64_t kMaxRows = 65535;  // of a grid

int64_t groups_of(const Call& call) { return (call.layout.block_size + kGroup - 1) / kGroup; }

dim3 grid_for(const Call& call) {
  return dim3(static_cast<unsigned>((groups_of(call) + kThreads - 1) / kThreads),
              static_cast<unsigned>(std::min(call.layout.blocks, kMaxRows)));
}

// Whether an operand lies as vectorised_kernel reads it: dense, whole packs aligned.
bool packed(const Call& call, Slot slot, DType dtype) {
  const Operand& op = call.layout.operands[slot];
  const int64_t pack = std::min<int64_t>(16, kGroup * size_of(dtype));
  return op.data && op.dtype == dtype && (call.layout.dims == 0 || op.strides[0] == 1) &&
         (call.layout.blocks == 1 || op.block_stride == call.layout.block_size) &&
         reinterpret_cast<uintptr_t>(op.data) % pack == 0;
}

// pairs.cuh is right for radii of any use. Half overflows from 16 on.
bool ordinary(const Call& call, Slot radius) {
  const double r = call.numbers[radius];
  return r == 0 || (r >= 0x1p-100 && r <= (call.dtype(kOut) == DType::kFloat16 ? 8 : 0x1p100));
}

const FlatEntry* find_flat(const Call& call, Kind kind) {
  const DType x = call.dtype(kX), result = x == DType::kUInt8 ? DType::kFloat32 : x;
  const bool grad = kind != Kind::kRandomInit;
  bool fits = ordinary(call, kEps) && ordinary(call, kNoise);
  fits = fits && call.layout.flat() && (call.layout.blocks == 1 || call.layout.block_size % kGroup == 0);
  // Its index of a group, and of a position where there is z, has 32 bits.
  fits = fits && call.layout.blocks <= kMaxRows && groups_of(call) * call.layout.blocks <= INT32_MAX;
  for (Slot parameter : {kAlpha, kEps, kNoise, kLo, kHi}) fits = fits && !call.has(parameter);
  fits = fits && packed(call, kX, x) && packed(call, kOut, result);
  fits = fits && (!grad || packed(call, kGrad, call.dtype(kGrad)));
  fits = fits && (kind != Kind::kPgd || packed(call, kIterate, result));
  fits = fits && (!call.has(kZ) || (packed(call, kZ, call.dtype(kZ)) && call.layout.block_size <= INT32_MAX));
  if (!fits) return nullptr;
  for (const FlatEntry& e : kFlat)
    if (e.kind == kind && e.x == x && (!grad || (e.grad == call.dtype(kGrad) && e.project == call.project))) return &e;
  return nullptr;
}

float inward(double bound, DType result, bool up) {
  const float b = static_cast<float>(bound);
  if (result == DType::kFloat16) return round_inward<Half>(b, up);
  return result == DType::kBFloat16 ? round_inward<BFloat16>(b, up) : b;
}

Flat flat_arguments(const Call& call) {
  auto number = [&](Slot s) { return static_cast<float>(call.numbers[s]); };
  Flat f{};
  f.x = call.layout.operands[kX].data;
  f.x0 = call.layout.operands[kIterate].data;
  f.grad = call.layout.operands[kGrad].data;
  f.out = call.layout.operands[kOut].data;
  f.groups = static_cast<uint32_t>(groups_of(call));
  f.whole = static_cast<uint32_t>(call.layout.block_size / kGroup);
  f.size = static_cast<uint64_t>(call.layout.block_size);
  f.seeds = call.seeds;
  f.seed = call.seed;
  f.alpha = number(kAlpha), f.eps = number(kEps), f.noise = number(kNoise);
  f.box = {inward(call.numbers[kLo], call.dtype(kOut), true), inward(call.numbers[kHi], call.dtype(kOut), false)};
  return f;
}

template <class U>
Divider<U> divider_of(int64_t n) {
  if (n < 2) return {};
  const uint64_t size = static_cast<uint64_t>(n);
  const int bits = 64 - __builtin_clzll(size - 1);
  const auto excess = (static_cast<unsigned __int128>(1) << bits) - size;
  return {static_cast<U>((excess << 8 * sizeof(U)) / size + 1), bits - 1};
}

Dividers dividers_of(const Call& call) {
  Dividers all{};
  for (int d = 0; d < call.layout.dims; ++d) all.of_dim[d] = divider_of<uint64_t>(call.layout.sizes[d]);
  return all;
}

template <class U>
ModelInput<U> model_input_of(const Call& call) {
  return {call.channels, divider_of<U>(call.channels.inner), divider_of<U>(call.channels.count)};
}

void launch(const Call& call, Kind kind, void* stream) {
  const dim3 grid = grid_for(call);
  const Operand& z = call.layout.operands[kZ];
  if (const FlatEntry* e = find_flat(call, kind)) {
    const Flat f = flat_arguments(call);
    if (!call.has(kZ)) return run<Overlap::kYes>(e->kernel, grid, stream, f);
    return run<Overlap::kYes>(e->with_z, grid, stream, FlatWithZ{f, z.data, z.dtype, model_input_of<uint32_t>(call)});
  }
  const AnyEntry& any = *std::find_if(std::begin(kAny), std::end(kAny), [&](auto& a) { return a.kind == kind; });
  const Dividers dividers = dividers_of(call);
  if (!call.has(kZ)) return run(call.any_float64() ? any.in_double : any.in_float, grid, stream, call, dividers);
  run(call.any_float64() ? any.in_double_with_z : any.in_float_with_z, grid, stream, call,
      DividersWithZ{dividers, model_input_of<uint64_t>(call)});
}

template <class... Parameters>
Attributes attributes_of(const std::string& name, void (*kernel)(Parameters...)) {
  cudaFuncAttributes a{};
  check(cudaFuncGetAttributes(&a, reinterpret_cast<const void*>(kernel)), name.c_str());
  int blocks = 0, threads = 0;
  check(cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, current_device()), name.c_str());
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), kThreads, 0),
        name.c_str());
  return {name, a.numRegs, static_cast<int>(a.localSizeBytes), static_cast<int>(a.sharedSizeBytes),
          static_cast<double>(blocks) * kThreads / threads};
}

}  // namespace

void random_init(const Call& call, void* stream) { launch(call, Kind::kRandomInit, stream); }
void pgd_step(const Call& call, void* stream) { launch(call, Kind::kPgd, stream); }
void fgsm_step(const Call& call, void* stream) {
  launch(call, call.has_noise ? Kind::kFgsmFromNoise : Kind::kFgsm, stream);
}

void philox_words(int64_t n, const int64_t* seed, const int64_t* index, const int64_t* restart, uint32_t word3,
                  int64_t* words, void* stream) {
  const unsigned blocks = static_cast<unsigned>((n + kThreads - 1) / kThreads);
  run(philox_kernel, dim3(blocks), stream, n, seed, index, restart, word3, words);
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "device");
  return device;
}

std::vector<Attributes> kernel_attributes() {
  std::vector<Attributes> all;
  for (const FlatEntry& e : kFlat) {
    all.push_back(attributes_of(e.name, e.kernel));
    all.push_back(attributes_of(e.name + std::string(" z"), e.with_z));
  }
  for (const AnyEntry& e : kAny) {
    all.push_back(attributes_of(e.name, e.in_float));
    all.push_back(attributes_of(e.name, e.in_double));
    all.push_back(attributes_of(e.name + std::string(" z"), e.in_float_with_z));
    all.push_back(attributes_of(e.name + std::string(" z"), e.in_double_with_z));
  }
  return all;
}

}  // namespace fastadv
