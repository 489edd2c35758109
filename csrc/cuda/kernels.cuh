// The CUDA kernels. No PyTorch header, so nvcc compiles them anywhere.
//
// flat_kernel is the fast path: every tensor dense in one order, aligned, in a common combination of dtypes, parameters
// that are numbers. A thread takes the eight elements that share one call of the generator, with accesses of 16 bytes.
// any_kernel takes everything else, element by element, dtypes looked up as it goes.
#pragma once

#include "../call.h"
#include "../philox.h"

namespace fastadv {

enum class Kind : int { kRandomInit, kFgsm, kFgsmFromNoise, kPgd };

constexpr int kGroup = 8;
constexpr int kThreads = 256;

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

// Eight elements; loads and stores of a pack are as wide as they can be, up to 16 bytes.
template <class T>
struct alignas(sizeof(T) == 1 ? 8 : 16) Pack {
  T v[kGroup];
};

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
__device__ __forceinline__ typename ResultOf<X>::Type flat_element(const Flat& f, X x_in, typename ResultOf<X>::Type x0_in,
                                                                   G grad, uint32_t h) {
  using R = typename ResultOf<X>::Type;
  const float x = load<float>(x_in);
  float x0 = x;
  if constexpr (kKind == Kind::kPgd) x0 = load<float>(x0_in);
  if constexpr (kKind == Kind::kRandomInit || kKind == Kind::kFgsmFromNoise)
    x0 = start<R>(x, h, f.noise * 0x1p-16f, f.noise, f.lo, f.hi);
  if constexpr (kKind == Kind::kRandomInit) return Store<R>::from(x0);
  return Store<R>::from(
      step<R, kProject>(x0, load_grad<float>(grad), x, f.alpha, 0.0f, f.eps, f.lo, f.hi));
}

template <Kind kKind, bool kProject, class X, class G>
__global__ void __launch_bounds__(kThreads) flat_kernel(const __grid_constant__ Flat f) {
  using R = typename ResultOf<X>::Type;
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
      xs = *reinterpret_cast<const Pack<X>*>(x);
      if constexpr (kX0) x0s = *reinterpret_cast<const Pack<R>*>(x0);
      if constexpr (kGrad) grads = *reinterpret_cast<const Pack<G>*>(grad);
    }
    if constexpr (kNoise) {
      const uint64_t seed = f.seeds ? static_cast<uint64_t>(f.seeds[f.blocks == 1 ? 0 : block]) : f.seed;
      words = philox(seed, static_cast<uint64_t>(group), 0, 0);
    }
    auto bits = [&](int j) -> uint32_t {
      if constexpr (!kNoise) return 0;
      return j % 2 ? words.v[j / 2] >> 16 : words.v[j / 2] & 0xffffu;
    };
    if (whole) {
      Pack<R> result;
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        result.v[j] = flat_element<kKind, kProject, X, G>(f, xs.v[j], x0s.v[j], grads.v[j], bits(j));
      *reinterpret_cast<Pack<R>*>(out) = result;
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (first + j < f.block_size)
          out[j] = flat_element<kKind, kProject, X, G>(f, x[j], kX0 ? x0[j] : R{}, kGrad ? grad[j] : G{}, bits(j));
    }
  }
}

// ---------------------------------------------------------------- everything else

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

// Calls f(a value of the type that dtype names).
template <class F>
__device__ __forceinline__ void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    default:
      return f(float{});  // and uint8: what its start is stored in
  }
}

// One element of any_kernel: where its operands are, and its parameters in the type that is asked for.
struct Element {
  const Call& call;
  int64_t offsets[kSlots];

  __device__ const Operand& operand(Slot s) const { return call.walk.operands[s]; }

  template <class C>
  __device__ C parameter(Slot s) const {
    return call.has(s) ? load_any<C>(operand(s), offsets[s]) : static_cast<C>(call.numbers[s]);
  }

  // A NaN in any parameter makes the result NaN: carried by the first, which enters every sum.
  template <class C>
  __device__ C first_parameter(Slot first, Slot radius) const {
    const C lo = parameter<C>(kLo), hi = parameter<C>(kHi), r = parameter<C>(radius);
    const C sum = (lo != lo ? lo : 0) + (hi != hi ? hi : 0) + (r != r ? r : 0);
    return sum != sum ? sum : parameter<C>(first);
  }

  template <class C>
  __device__ C random_start(uint32_t h) const {
    C x0 = 0;
    with_type(call.dtype(kX), [&](auto type) {
      using R = decltype(type);
      const C noise = first_parameter<C>(kNoise, kNoise);
      x0 = start<R>(load_any<C>(operand(kX), offsets[kX]), h, noise * static_cast<C>(0x1p-16), noise,
                    round_inward<R>(parameter<C>(kLo), true), round_inward<R>(parameter<C>(kHi), false));
    });
    return x0;
  }

  template <class C>
  __device__ void random_init(uint32_t h) const {
    with_type(call.dtype(kOut), [&](auto type) {
      using R = decltype(type);
      const C noise = first_parameter<C>(kNoise, kNoise);
      store<R>(start<R>(load_any<C>(operand(kX), offsets[kX]), h, noise * static_cast<C>(0x1p-16), noise,
                        round_inward<R>(parameter<C>(kLo), true), round_inward<R>(parameter<C>(kHi), false)));
    });
  }

  template <class C>
  __device__ void take_step(C x0) const {
    with_type(call.dtype(kOut), [&](auto type) {
      using R = decltype(type);
      const C x = load_any<C>(operand(kX), offsets[kX]), grad = load_any_grad<C>(operand(kGrad), offsets[kGrad]);
      const C alpha = first_parameter<C>(kAlpha, call.project ? kEps : kAlpha), eps = parameter<C>(kEps);
      const C lo = round_inward<R>(parameter<C>(kLo), true), hi = round_inward<R>(parameter<C>(kHi), false);
      store<R>(call.project ? step<R, true>(x0, grad, x, alpha, alpha * 0, eps, lo, hi)
                            : step<R, false>(x0, grad, x, alpha, alpha * 0, eps, lo, hi));
    });
  }

  template <class R, class C>
  __device__ void store(C value) const {
    reinterpret_cast<R*>(operand(kOut).data)[offsets[kOut]] = Store<R>::from(value);
  }
};

template <Kind kKind, class C>
__global__ void __launch_bounds__(kThreads) any_kernel(const __grid_constant__ Call call) {
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
      if (position >= walk.block_size) return;
      Element e{call, {}};
#pragma unroll
      for (int k = 0; k < kSlots; ++k) e.offsets[k] = block * walk.operands[k].block_stride;
      int64_t rest = position;
      for (int d = walk.dims - 1; d >= 0; --d) {
        const int64_t outer = rest / walk.sizes[d], at = rest - outer * walk.sizes[d];
        rest = outer;
#pragma unroll
        for (int k = 0; k < kSlots; ++k)
          if (call.has(static_cast<Slot>(k))) e.offsets[k] += at * walk.operands[k].strides[d];
      }
      uint32_t h = 0;
      if constexpr (kNoise) {
        const uint32_t low = j & 2 ? words.v[1] : words.v[0], high = j & 2 ? words.v[3] : words.v[2];
        const uint32_t word = j & 4 ? high : low;
        h = j & 1 ? word >> 16 : word & 0xffffu;
      }
      if constexpr (kKind == Kind::kRandomInit) {
        e.template random_init<C>(h);
      } else if constexpr (kKind == Kind::kPgd) {
        e.take_step(load_any<C>(e.operand(kX0), e.offsets[kX0]));
      } else if constexpr (kKind == Kind::kFgsm) {
        e.take_step(load_any<C>(e.operand(kX), e.offsets[kX]));
      } else {
        // The start is random_init's: in float, unless x itself is double.
        e.take_step(call.dtype(kX) == DType::kFloat64 ? e.template random_start<C>(h)
                                                      : static_cast<C>(e.template random_start<float>(h)));
      }
    }
  }
}

static __global__ void __launch_bounds__(kThreads)
    philox_kernel(int64_t n, const int64_t* seed, const int64_t* index, const int64_t* restart, uint32_t word3,
                  int64_t* words) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const Words w = philox(static_cast<uint64_t>(seed[i]), static_cast<uint64_t>(index[i]),
                         static_cast<uint32_t>(restart[i]), word3);
#pragma unroll
  for (int j = 0; j < 4; ++j) words[4 * i + j] = w.v[j];
}

}  // namespace fastadv
