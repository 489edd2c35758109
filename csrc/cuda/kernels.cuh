// The CUDA kernels. No PyTorch header, so nvcc compiles them anywhere.
//
// vectorised_kernel is the fast path: every tensor dense in one order, aligned, in a common combination of dtypes,
// parameters that are numbers. A thread takes the eight elements that share one call of the generator, with accesses of
// 16 bytes. strided_kernel takes everything else, element by element, dtypes looked up as it goes.
#pragma once

#include <cstring>
#include <type_traits>

#include "../call.h"
#include "../philox.h"
#include "pairs.cuh"

namespace fastadv {

enum class Kind : int { kRandomInit, kFgsm, kFgsmFromNoise, kPgd };

constexpr int kGroup = 8;
constexpr int kThreads = 128;  // small blocks fill the multiprocessors evenly

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

__device__ __forceinline__ uint64_t high_product(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
__device__ __forceinline__ uint32_t high_product(uint32_t a, uint32_t b) { return mul_high(a, b); }

// Division by a size as a multiplication (Granlund and Montgomery 1994, figure 4.1): the instruction set has none, and
// the routine that stands in for it costs more than all the rest. Not by 1.
template <class U>
struct Divider {
  U multiplier;
  int shift;

  __device__ __forceinline__ U divide(U n) const {
    const U t = high_product(multiplier, n);
    return (t + ((n - t) >> 1)) >> shift;
  }
};

// ---------------------------------------------------------------- the model's next input

// Kernels come in two forms, told by their arguments' type: those that write no z know nothing of it. U: what holds a
// position.
template <class U>
struct ModelInput : Channels {
  Divider<U> by_inner, by_count;

  __device__ __forceinline__ U run_of(U position) const { return inner == 1 ? position : by_inner.divide(position); }
  __device__ __forceinline__ U channel_of(U run) const {
    return count == 1 ? 0 : run - by_count.divide(run) * static_cast<U>(count);
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
  uint64_t size;           // elements of each sample, or of all where they share a seed
  uint32_t groups, whole;  // the same in groups, and in whole ones
  const int64_t* seeds;    // one, or one per sample; null: `seed`
  uint64_t seed;
  float alpha, eps, noise;
  Box box;  // rounded inward to the result type
};

struct FlatWithZ : Flat {
  void* z;
  DType z_type;
  ModelInput<uint32_t> input;
};

// As one instruction: the compiler splits some stores in four.
__device__ __forceinline__ void store_whole(uint4* p, uint4 v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#else
  *p = v;
#endif
}

// The kernel may be launched before the one ahead of it in the stream has ended (compute capability 9): here it waits,
// before it touches memory, and lets the next one come in turn.
__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n griddepcontrol.wait;" ::: "memory");
#endif
}

// Eight elements, as four words of two.
template <class T>
struct Pack {
  typename Two<T>::Word w[kGroup / 2];
};

template <class Access, int kCount, class T>
__device__ __forceinline__ void load_wide(void* words, const T* p) {
  Access raw[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) raw[i] = reinterpret_cast<const Access*>(p)[i];
  memcpy(words, raw, sizeof(raw));
}
template <int kCount, class T>
__device__ __forceinline__ void store_wide(T* p, const void* words) {
  uint4 raw[kCount];
  memcpy(raw, words, sizeof(raw));
#pragma unroll
  for (int i = 0; i < kCount; ++i) store_whole(reinterpret_cast<uint4*>(p) + i, raw[i]);
}

// Where a thread's eight elements are: two chunks of four. Not swapped, the two chunks are one group. Swapped, as for
// float results, two neighbouring lanes share their two groups:
//
//     elements       0..3     4..7     8..11    12..15         (of groups 0 and 1)
//     not swapped    lane 0   lane 0   lane 1   lane 1
//     swapped        lane 0   lane 1   lane 0   lane 1
//
// Swapped, an access of 16 bytes a lane fills the L2 cache's sectors of 32 bytes with two lanes. Not swapped, each
// access would touch a half of twice as many sectors, which costs the L2 cache twice the work. Tensors of 16 or 8 bits,
// and random bits, come by groups: there lanes load a group each and exchange halves (`swap`).
template <bool kSwapped>
struct ThreadElements {
  static constexpr int kChunk = kGroup / 2, kSecond = kSwapped ? 2 : 1;  // chunks from the first to the second
  uint32_t row, number;  // the sample's first group in the tensor, and the lane's group in the sample
  bool whole;            // wide accesses are possible: for the warp if lanes swap
  uint64_t size;         // of the sample

  __device__ __forceinline__ uint32_t first_chunk() const { return kSwapped ? 2 * number - (number & 1) : 2 * number; }
  __device__ __forceinline__ uint64_t position(int chunk) const {
    return static_cast<uint64_t>(first_chunk() + chunk * kSecond) * kChunk;
  }
  // The chunk's first element in a tensor.
  template <class T>
  __device__ __forceinline__ T* at(T* p, int chunk) const {
    return p + (static_cast<uint64_t>(2 * row + first_chunk()) * kChunk + chunk * kSecond * kChunk);
  }

  template <class T>
  __device__ __forceinline__ bool wide() const {
#ifdef __CUDA_ARCH__
    return whole;
#else
    return whole && !(kSwapped && sizeof(T) < 4);  // lanes that run one after the other cannot swap
#endif
  }

  // Exchanges halves with the neighbouring lane: from one group a lane to its two chunks, and back.
  template <class T>
  __device__ __forceinline__ void swap(T& words) const {
#ifdef __CUDA_ARCH__
    constexpr int kHalf = sizeof(T) / 8;
    uint32_t w[2 * kHalf];
    memcpy(w, &words, sizeof(w));
    const bool odd = number & 1;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const uint32_t taken = __shfl_xor_sync(~0u, odd ? w[i] : w[i + kHalf], 1);
      w[i] = odd ? taken : w[i];
      w[i + kHalf] = odd ? w[i + kHalf] : taken;
    }
    memcpy(&words, w, sizeof(w));
#endif
  }

  template <class T>
  __device__ __forceinline__ Pack<T> load(const void* tensor) const {
    const T* p = static_cast<const T*>(tensor);
    Pack<T> pack{};
    if (!wide<T>()) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (position(j / kChunk) + j % kChunk < size) Two<T>::set(pack.w[j / 2], j % 2, at(p, j / kChunk)[j % kChunk]);
    } else if constexpr (sizeof(T) >= 4) {
#pragma unroll
      for (int k = 0; k < 2; ++k) load_wide<uint4, sizeof(T) / 4>(pack.w + 2 * k, at(p, k));
    } else {
      using Access = typename std::conditional<sizeof(T) == 1, uint2, uint4>::type;
      load_wide<Access, 1>(pack.w, p + static_cast<uint64_t>(row + number) * kGroup);
      if (kSwapped) swap(pack.w);
    }
    return pack;
  }

  template <class T>
  __device__ __forceinline__ void store(void* tensor, Pack<T> pack) const {
    T* p = static_cast<T*>(tensor);
    if (!wide<T>()) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (position(j / kChunk) + j % kChunk < size) at(p, j / kChunk)[j % kChunk] = Two<T>::get(pack.w[j / 2], j % 2);
    } else if constexpr (sizeof(T) >= 4) {
#pragma unroll
      for (int k = 0; k < 2; ++k) store_wide<sizeof(T) / 4>(at(p, k), pack.w + 2 * k);
    } else {
      if (kSwapped) swap(pack.w);
      store_wide<1>(p + static_cast<uint64_t>(row + number) * kGroup, pack.w);
    }
  }

  // The random bits of the two chunks; the generator makes them for a group at a time.
  __device__ __forceinline__ Words random_bits(uint64_t seed) const {
#ifdef __CUDA_ARCH__
    Words bits = philox(seed, number, 0, 0);
    if (kSwapped) swap(bits);
    return bits;
#else
    if (!kSwapped) return philox(seed, number, 0, 0);
    const Words one = philox(seed, number & ~1u, 0, 0), other = philox(seed, number | 1u, 0, 0);
    const int i = number & 1 ? 2 : 0;
    return {{one.v[i], one.v[i + 1], other.v[i], other.v[i + 1]}};
#endif
  }
};

template <class Z, class P>
__device__ __forceinline__ void store_narrowed(void* z, const P& elements, const Pair* values) {
  Pack<Z> pack;
#pragma unroll
  for (int i = 0; i < kGroup / 2; ++i) pack.w[i] = Two<Z>::narrow(values[i]);
  elements.store(z, pack);
}
template <class P>
__device__ __forceinline__ void store_narrowed_to(DType type, void* z, const P& elements, const Pair* values) {
  FASTADV_BY_TYPE(type, store_narrowed, z, elements, values);
}

// A thread's values as the model's input; nearly always all of one channel.
template <class P>
__device__ __forceinline__ void normalize_all(const ModelInput<uint32_t>& input, const P& elements, Pair* values) {
  const uint32_t inner = static_cast<uint32_t>(input.inner), count = static_cast<uint32_t>(input.count);
  uint32_t first = static_cast<uint32_t>(elements.position(0)), run = input.run_of(first),
           channel = input.channel_of(run);
  uint32_t left = (run + 1) * inner - first;
  if (left >= (P::kSecond + 1) * P::kChunk || count == 1) {
    const float mean = static_cast<const float*>(input.mean)[channel];
    const float scale = static_cast<const float*>(input.scale)[channel];
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i)
      values[i] = {normalized(values[i].a, mean, scale), normalized(values[i].b, mean, scale)};
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    if (P::kSecond > 1 && j == P::kChunk) {
      first = static_cast<uint32_t>(elements.position(1)), run = input.run_of(first), channel = input.channel_of(run);
      left = (run + 1) * inner - first;
    }
    float& value = j % 2 ? values[j / 2].b : values[j / 2].a;
    value = input.normalize(value, channel);
    if (--left == 0) {
      left = inner;
      channel = channel + 1 < count ? channel + 1 : 0;
    }
  }
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

template <Kind kKind, bool kProject, class X, class G, class F>
__global__ void __launch_bounds__(kThreads) vectorised_kernel(const __grid_constant__ F f) {
  using R = typename ResultOf<X>::Type;
  constexpr bool kNoise = kKind == Kind::kRandomInit || kKind == Kind::kFgsmFromNoise;
  constexpr bool kGrad = kKind != Kind::kRandomInit, kIterate = kKind == Kind::kPgd;
  constexpr bool kSwapped = std::is_same<R, float>::value;
  const uint32_t number = blockIdx.x * kThreads + threadIdx.x;
  if (!kSwapped && number >= f.groups) return;
  const uint32_t last = kSwapped ? number | 31 : number;
  const ThreadElements<kSwapped> elements{blockIdx.y * f.groups, number, last < f.whole, f.size};
  wait_for_predecessor();

  const Pack<X> xs = elements.template load<X>(f.x);
  Pack<R> x0s{}, result;
  Pack<G> grads{};
  if constexpr (kIterate) x0s = elements.template load<R>(f.x0);
  if constexpr (kGrad) grads = elements.template load<G>(f.grad);
  Words bits{};
  if constexpr (kNoise) {
    const uint64_t seed = f.seeds ? static_cast<uint64_t>(f.seeds[blockIdx.y]) : f.seed;
    bits = elements.random_bits(seed);
  }
#pragma unroll
  for (int i = 0; i < kGroup / 2; ++i) {
    const Pair clean = Two<X>::widen(xs.w[i]);
    if constexpr (kNoise) x0s.w[i] = start<R>(clean, bits.v[i], f.noise, f.box);
    result.w[i] = x0s.w[i];
    if constexpr (kGrad) {
      const Pair from = kNoise || kIterate ? Two<R>::widen(x0s.w[i]) : clean;
      result.w[i] = step<R, G, kProject>(from, grads.w[i], clean, f.alpha, f.eps, f.box);
    }
  }
  elements.store(f.out, result);
  if constexpr (std::is_same<F, FlatWithZ>::value) {
    Pair values[kGroup / 2];
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i) values[i] = Two<R>::widen(result.w[i]);
    normalize_all(f.input, elements, values);
    store_narrowed_to(f.z_type, f.z, elements, values);
  }
}

// ---------------------------------------------------------------- everything else

struct Dividers {
  Divider<uint64_t> of_dim[kMaxDims];
};
struct DividersWithZ : Dividers {
  ModelInput<uint64_t> input;
};

// The 16 random bits of a group's element j; selected, because a register array has no run-time index.
__device__ __forceinline__ uint32_t bits_of(const Words& words, int j) {
  const uint32_t low = j & 2 ? words.v[1] : words.v[0], high = j & 2 ? words.v[3] : words.v[2];
  const uint32_t word = j & 4 ? high : low;
  return j & 1 ? word >> 16 : word & 0xffffu;
}

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

// One element of strided_kernel: where its operands are, and its parameters in the type that is asked for.
struct Element {
  const Call& call;
  int64_t offsets[kSlots];

  __device__ __forceinline__ const Operand& operand(Slot s) const { return call.layout.operands[s]; }

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
    strided_kernel(const __grid_constant__ Call call, const __grid_constant__ D dividers) {
  constexpr bool kWithZ = std::is_same<D, DividersWithZ>::value;
  constexpr int kOperands = kWithZ ? kSlots : kZ;
  constexpr bool kNoise = kKind == Kind::kRandomInit || kKind == Kind::kFgsmFromNoise;
  const auto& layout = call.layout;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t block = blockIdx.y; block < layout.blocks; block += gridDim.y) {
    Words words{};
    if constexpr (kNoise) {
      const uint64_t seed = call.seeds ? static_cast<uint64_t>(call.seeds[layout.blocks == 1 ? 0 : block]) : call.seed;
      words = philox(seed, static_cast<uint64_t>(group), 0, 0);
    }
#pragma unroll 1
    for (int j = 0; j < kGroup; ++j) {
      const int64_t position = group * kGroup + j;
      if (position >= layout.block_size) break;
      Element e{call, {}};
#pragma unroll
      for (int k = 0; k < kOperands; ++k) e.offsets[k] = block * layout.operands[k].block_stride;
      int64_t rest = position;
      for (int d = layout.dims - 1; d >= 0; --d) {
        const int64_t outer = static_cast<int64_t>(dividers.of_dim[d].divide(rest)),
                      at = rest - outer * layout.sizes[d];
        rest = outer;
#pragma unroll
        for (int k = 0; k < kOperands; ++k)
          if (call.has(static_cast<Slot>(k))) e.offsets[k] += at * layout.operands[k].strides[d];
      }
      const uint32_t h = bits_of(words, j);
      C w;
      if constexpr (kKind == Kind::kRandomInit) {
        w = e.template random_start<C>(call.dtype(kOut), h);
      } else if constexpr (kKind == Kind::kPgd) {
        w = e.take_step(load_any<C>(e.operand(kIterate), e.offsets[kIterate]));
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
        const ModelInput<uint64_t>& input = dividers.input;
        const uint64_t channel = input.channel_of(input.run_of(position));
        store_rounded(call.dtype(kZ), e.operand(kZ).data, e.offsets[kZ], input.normalize(w, channel));
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
