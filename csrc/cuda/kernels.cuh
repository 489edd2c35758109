// The CUDA kernels. No PyTorch header, so nvcc compiles them anywhere.
//
// flat_kernel is the fast path: every tensor dense in one order, aligned, in a common combination of dtypes, parameters
// that are numbers. A thread takes the eight elements that share one call of the generator, with accesses of 16 bytes.
// any_kernel takes everything else, element by element, dtypes looked up as it goes.
#pragma once

#include <cstring>
#include <type_traits>

#include "../call.h"
#include "../philox.h"

namespace fastadv {

enum class Kind : int { kRandomInit, kFgsm, kFgsmFromNoise, kPgd };

constexpr int kGroup = 8;
constexpr int kThreads = 256;

// f<the type that dtype names>(...). A macro, because ptxas must see it inlined: a call would put offsets in memory.
#define FASTADV_BY_TYPE(dtype, f, ...)                     \
  switch (dtype) {                                         \
    case DType::kFloat64:                                  \
      return f<double>(__VA_ARGS__);                       \
    case DType::kFloat16:                                  \
      return f<Half>(__VA_ARGS__);                         \
    case DType::kBFloat16:                                 \
      return f<BFloat16>(__VA_ARGS__);                     \
    default: /* uint8 too: its start is stored in float */ \
      return f<float>(__VA_ARGS__);                        \
  }

// Division by a size as a multiplication (Granlund and Montgomery 1994, figure 4.1): the instruction set has none for
// 64 bits, and the routine that stands in for it costs more than all the rest. Not by 1.
struct Divider {
  uint64_t multiplier;
  int shift;

  __device__ __forceinline__ uint64_t divide(uint64_t n) const {
    const uint64_t t = __umul64hi(multiplier, n);
    return (t + ((n - t) >> 1)) >> shift;
  }
};

// ---------------------------------------------------------------- the model's next input

// Kernels come in two forms, told by their arguments' type: those that write no z know nothing of it.
struct ModelInput : Channels {
  Divider by_inner, by_count;

  __device__ __forceinline__ int64_t run_of(int64_t position) const {
    return inner == 1 ? position : static_cast<int64_t>(by_inner.divide(position));
  }
  __device__ __forceinline__ int64_t channel_of(int64_t position) const {
    const int64_t run = run_of(position);
    return count == 1 ? 0 : run - static_cast<int64_t>(by_count.divide(run)) * count;
  }

  template <class C>
  __device__ __forceinline__ C normalize(C w, int64_t channel) const {
    return normalized(w, static_cast<const C*>(mean)[channel], static_cast<const C*>(scale)[channel]);
  }
};

template <class Z, class C>
__device__ __forceinline__ void store_one(void* z, int64_t at, C value) {
  static_cast<Z*>(z)[at] = rounded<Z>(value);
}
template <class C>
__device__ __forceinline__ void store_rounded(DType type, void* z, int64_t at, C value) {
  FASTADV_BY_TYPE(type, store_one, z, at, value)
}

// ---------------------------------------------------------------- the fast path

struct Flat {
  const void* x;
  const void* x0;
  const void* grad;
  void* out;
  int64_t block_size;  // elements that are drawn together; all of them but for per-sample seeds
  int64_t blocks;
  const int64_t* seeds;  // one, or one per block; null: `seed`
  uint64_t seed;
  float alpha, eps, noise, lo, hi;  // lo and hi rounded inward to the result type
};

struct FlatWithZ : Flat {
  void* z;
  DType z_type;
  ModelInput input;
};

// As one instruction: the compiler splits some stores in four.
__device__ __forceinline__ void store_whole(uint4* p, uint4 v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#else
  *p = v;
#endif
}

// Eight elements, moved by accesses as wide as they can be, up to 16 bytes.
template <class T>
struct Pack {
  using Access = typename std::conditional<sizeof(T) == 1, uint2, uint4>::type;
  static constexpr int kAccesses = kGroup * sizeof(T) / sizeof(Access);
  T v[kGroup];

  __device__ __forceinline__ void load_from(const T* p) {
    Access raw[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) raw[i] = reinterpret_cast<const Access*>(p)[i];
    memcpy(v, raw, sizeof(v));
  }
  __device__ __forceinline__ void store_to(T* p) const {
    Access raw[kAccesses];
    memcpy(raw, v, sizeof(v));
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) store_whole(reinterpret_cast<Access*>(p) + i, raw[i]);
  }
};

template <class Z>
__device__ __forceinline__ void store_pack(void* z, int64_t at, const float* values) {
  Pack<Z> pack;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) pack.v[j] = rounded<Z>(values[j]);
  pack.store_to(static_cast<Z*>(z) + at);
}
__device__ __forceinline__ void store_pack_rounded(DType type, void* z, int64_t at, const float* values) {
  FASTADV_BY_TYPE(type, store_pack, z, at, values)
}

// The channel of one element of a group after the other.
struct Channel {
  int now, left, inner, count;

  __device__ __forceinline__ Channel(const ModelInput& input, int64_t position) {
    const int64_t rest = (input.run_of(position) + 1) * input.inner - position;
    now = static_cast<int>(input.channel_of(position));
    left = static_cast<int>(rest < kGroup ? rest : kGroup);  // as good as more: there is no second end in the group
    inner = static_cast<int>(input.inner < kGroup ? input.inner : kGroup);
    count = static_cast<int>(input.count);
  }
  __device__ __forceinline__ void advance() {
    if (--left > 0) return;
    left = inner;
    now = now + 1 < count ? now + 1 : 0;
  }
};

// The 16 random bits of a group's element j; selected, because a register array has no run-time index.
__device__ __forceinline__ uint32_t bits_of(const Words& words, int j) {
  const uint32_t low = j & 2 ? words.v[1] : words.v[0], high = j & 2 ? words.v[3] : words.v[2];
  const uint32_t word = j & 4 ? high : low;
  return j & 1 ? word >> 16 : word & 0xffffu;
}

// What a result is stored in: x's own type, float for uint8.
template <class X>
struct ResultOf {
  using Type = X;
};
template <>
struct ResultOf<uint8_t> {
  using Type = float;
};

template <Kind kKind, bool kProject, class X, class G>
__device__ __forceinline__ typename ResultOf<X>::Type flat_element(const Flat& f, X x_in,
                                                                   typename ResultOf<X>::Type x0_in, G grad,
                                                                   uint32_t h) {
  using R = typename ResultOf<X>::Type;
  const float x = load<float>(x_in);
  float x0 = x;
  if constexpr (kKind == Kind::kPgd) x0 = load<float>(x0_in);
  if constexpr (kKind == Kind::kRandomInit || kKind == Kind::kFgsmFromNoise)
    x0 = start<R>(x, h, f.noise * 0x1p-16f, f.noise, f.lo, f.hi);
  if constexpr (kKind == Kind::kRandomInit) return Store<R>::from(x0);
  return Store<R>::from(step<R, kProject>(x0, load_grad<float>(grad), x, f.alpha, 0.0f, f.eps, f.lo, f.hi));
}

template <Kind kKind, bool kProject, class X, class G, class F>
__global__ void __launch_bounds__(kThreads) flat_kernel(const __grid_constant__ F f) {
  using R = typename ResultOf<X>::Type;
  constexpr bool kWithZ = std::is_same<F, FlatWithZ>::value;
  constexpr bool kNoise = kKind == Kind::kRandomInit || kKind == Kind::kFgsmFromNoise;
  constexpr bool kGrad = kKind != Kind::kRandomInit, kX0 = kKind == Kind::kPgd;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, first = group * kGroup;
  if (first >= f.block_size) return;

  for (int64_t block = blockIdx.y; block < f.blocks; block += gridDim.y) {
    const int64_t offset = block * f.block_size + first;
    const X* x = static_cast<const X*>(f.x) + offset;
    const R* x0 = static_cast<const R*>(f.x0) + offset;
    const G* grad = static_cast<const G*>(f.grad) + offset;
    R* out = static_cast<R*>(f.out) + offset;

    Pack<X> xs{};
    Pack<R> x0s{};
    Pack<G> grads{};
    Words words{};
    const bool whole = first + kGroup <= f.block_size;
    if (whole) {
      xs.load_from(x);
      if constexpr (kX0) x0s.load_from(x0);
      if constexpr (kGrad) grads.load_from(grad);
    }
    if constexpr (kNoise) {
      const uint64_t seed = f.seeds ? static_cast<uint64_t>(f.seeds[f.blocks == 1 ? 0 : block]) : f.seed;
      words = philox(seed, static_cast<uint64_t>(group), 0, 0);
    }
    if (whole) {
      Pack<R> result;
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        result.v[j] = flat_element<kKind, kProject, X, G>(f, xs.v[j], x0s.v[j], grads.v[j], bits_of(words, j));
      result.store_to(out);
      if constexpr (kWithZ) {
        float values[kGroup];
        Channel channel(f.input, first);
#pragma unroll
        for (int j = 0; j < kGroup; ++j, channel.advance())
          values[j] = f.input.normalize(load<float>(result.v[j]), channel.now);
        store_pack_rounded(f.z_type, f.z, offset, values);
      }
    } else {
#pragma unroll 1
      for (int j = 0; first + j < f.block_size; ++j) {
        const R w =
            flat_element<kKind, kProject, X, G>(f, x[j], kX0 ? x0[j] : R{}, kGrad ? grad[j] : G{}, bits_of(words, j));
        out[j] = w;
        if constexpr (kWithZ) {
          const float value = f.input.normalize(load<float>(w), f.input.channel_of(first + j));
          store_rounded(f.z_type, f.z, offset + j, value);
        }
      }
    }
  }
}

// ---------------------------------------------------------------- everything else

struct Dividers {
  Divider of_dim[kMaxDims];
};
struct DividersWithZ : Dividers {
  ModelInput input;
};

template <class C>
__device__ __forceinline__ C load_any(const Operand& op, int64_t offset) {
  switch (op.dtype) {
    case DType::kFloat64:
      return load<C>(reinterpret_cast<const double*>(op.data)[offset]);
    case DType::kFloat32:
      return load<C>(reinterpret_cast<const float*>(op.data)[offset]);
    case DType::kFloat16:
      return load<C>(reinterpret_cast<const Half*>(op.data)[offset]);
    case DType::kBFloat16:
      return load<C>(reinterpret_cast<const BFloat16*>(op.data)[offset]);
    default:
      return load<C>(reinterpret_cast<const uint8_t*>(op.data)[offset]);
  }
}

template <class C>
__device__ __forceinline__ C load_any_grad(const Operand& op, int64_t offset) {
  if (op.dtype == DType::kFloat64) return load_grad<C>(reinterpret_cast<const double*>(op.data)[offset]);
  return load_any<C>(op, offset);
}

// One element of any_kernel: where its operands are, and its parameters in the type that is asked for.
struct Element {
  const Call& call;
  int64_t offsets[kSlots];

  __device__ __forceinline__ const Operand& operand(Slot s) const { return call.walk.operands[s]; }

  template <class C>
  __device__ __forceinline__ C parameter(Slot s) const {
    return call.has(s) ? load_any<C>(operand(s), offsets[s]) : static_cast<C>(call.numbers[s]);
  }

  // A NaN in any parameter makes the result NaN: carried by the first, which enters every sum.
  template <class C>
  static __device__ __forceinline__ C keep_nan(C first, C radius, C lo, C hi) {
    if (radius != radius) first = radius;
    if (lo != lo) first = lo;
    return hi != hi ? hi : first;
  }

  template <class R, class C>
  __device__ __forceinline__ C start_as(C x, uint32_t h) const {
    const C lo = round_inward<R>(parameter<C>(kLo), true), hi = round_inward<R>(parameter<C>(kHi), false);
    const C noise = keep_nan(parameter<C>(kNoise), C{0}, lo, hi);
    return start<R>(x, h, noise * static_cast<C>(0x1p-16), noise, lo, hi);
  }

  template <class R, class C>
  __device__ __forceinline__ C step_as(C x0) const {
    const C x = load_any<C>(operand(kX), offsets[kX]), grad = load_any_grad<C>(operand(kGrad), offsets[kGrad]);
    const C lo = round_inward<R>(parameter<C>(kLo), true), hi = round_inward<R>(parameter<C>(kHi), false);
    const C eps = parameter<C>(kEps), alpha = keep_nan(parameter<C>(kAlpha), call.project ? eps : C{0}, lo, hi);
    return call.project ? step<R, true>(x0, grad, x, alpha, alpha * 0, eps, lo, hi)
                        : step<R, false>(x0, grad, x, alpha, alpha * 0, eps, lo, hi);
  }

  // The two below: as a result of the given type, still in the compute type.
  template <class C>
  __device__ __forceinline__ C random_start(DType result, uint32_t h) const {
    const C x = load_any<C>(operand(kX), offsets[kX]);
    FASTADV_BY_TYPE(result, start_as, x, h)
  }
  template <class C>
  __device__ __forceinline__ C take_step(C x0) const {
    FASTADV_BY_TYPE(call.dtype(kOut), step_as, x0)
  }

  template <class R, class C>
  __device__ __forceinline__ void store_as(C value) const {
    reinterpret_cast<R*>(operand(kOut).data)[offsets[kOut]] = Store<R>::from(value);
  }
  template <class C>
  __device__ __forceinline__ void store(C value) const {
    FASTADV_BY_TYPE(call.dtype(kOut), store_as, value)
  }
};

template <Kind kKind, class C, class D>
__global__ void __launch_bounds__(kThreads, 1)
    any_kernel(const __grid_constant__ Call call, const __grid_constant__ D dividers) {
  constexpr bool kWithZ = std::is_same<D, DividersWithZ>::value;
  constexpr int kOperands = kWithZ ? kSlots : kZ;
  constexpr bool kNoise = kKind == Kind::kRandomInit || kKind == Kind::kFgsmFromNoise;
  const auto& walk = call.walk;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t block = blockIdx.y; block < walk.blocks; block += gridDim.y) {
    Words words{};
    if constexpr (kNoise) {
      const uint64_t seed = call.seeds ? static_cast<uint64_t>(call.seeds[walk.blocks == 1 ? 0 : block]) : call.seed;
      words = philox(seed, static_cast<uint64_t>(group), 0, 0);
    }
#pragma unroll 1
    for (int j = 0; j < kGroup; ++j) {
      const int64_t position = group * kGroup + j;
      if (position >= walk.block_size) break;
      Element e{call, {}};
#pragma unroll
      for (int k = 0; k < kOperands; ++k) e.offsets[k] = block * walk.operands[k].block_stride;
      int64_t rest = position;
      for (int d = walk.dims - 1; d >= 0; --d) {
        const int64_t outer = static_cast<int64_t>(dividers.of_dim[d].divide(rest)), at = rest - outer * walk.sizes[d];
        rest = outer;
#pragma unroll
        for (int k = 0; k < kOperands; ++k)
          if (call.has(static_cast<Slot>(k))) e.offsets[k] += at * walk.operands[k].strides[d];
      }
      const uint32_t h = bits_of(words, j);
      C w;
      if constexpr (kKind == Kind::kRandomInit) {
        w = e.template random_start<C>(call.dtype(kOut), h);
      } else if constexpr (kKind == Kind::kPgd) {
        w = e.take_step(load_any<C>(e.operand(kX0), e.offsets[kX0]));
      } else if constexpr (kKind == Kind::kFgsm) {
        w = e.take_step(load_any<C>(e.operand(kX), e.offsets[kX]));
      } else {
        // The start is random_init's: in float, unless x itself is double.
        const DType x = call.dtype(kX);
        w = e.take_step(x == DType::kFloat64 ? e.template random_start<C>(x, h)
                                             : static_cast<C>(e.template random_start<float>(x, h)));
      }
      e.store(w);
      if constexpr (kWithZ) {
        const ModelInput& input = dividers.input;
        store_rounded(call.dtype(kZ), e.operand(kZ).data, e.offsets[kZ],
                      input.normalize(w, input.channel_of(position)));
      }
    }
  }
}

static __global__ void __launch_bounds__(kThreads)
    philox_kernel(int64_t n, const int64_t* seed, const int64_t* index, const int64_t* restart, uint32_t word3,
                  int64_t* words) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const Words w =
      philox(static_cast<uint64_t>(seed[i]), static_cast<uint64_t>(index[i]), static_cast<uint32_t>(restart[i]), word3);
#pragma unroll
  for (int j = 0; j < 4; ++j) words[4 * i + j] = w.v[j];
}

}  // namespace fastadv
