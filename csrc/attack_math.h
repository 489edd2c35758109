// The per-pixel formulas of the L-inf steps, host and device, written once. C is the compute type (float or double),
// R the type a result is stored in. Every operation rounds once: compile without fused multiply-add and fast-math.
//
// A value of a 16-bit type is handled as the float (or double) that equals it; only loads and stores know its bits.
#pragma once

#include <cstdint>

#include "target.h"

namespace fastadv {

enum class Half : uint16_t {};  // the bits
enum class BFloat16 : uint16_t {};

template <class To, class From>
FASTADV_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// ---------------------------------------------------------------- NaN-keeping minimum and maximum

// A NaN in v stays. On the GPU a NaN in bound wins too; on the CPU the parameters are cleared of NaN beforehand.
template <class C>
FASTADV_HD C at_least(C v, C bound) {
  return bound > v ? bound : v;
}
template <class C>
FASTADV_HD C at_most(C v, C bound) {
  return bound < v ? bound : v;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ float at_least(float v, float bound) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(bound));
  return r;
}
template <>
__device__ __forceinline__ float at_most(float v, float bound) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(bound));
  return r;
}
#endif

FASTADV_HD float magnitude(float v) { return __builtin_fabsf(v); }
FASTADV_HD double magnitude(double v) { return __builtin_fabs(v); }

// ---------------------------------------------------------------- rounding to the stored type, as a value

// The float next to w, towards smaller values where difference >= 0 and larger where it is negative; difference is
// w - x, so that is towards x. kUnit floats away: bfloat16 is float's upper half, its neighbours are 2^16 apart.
// Bits count the magnitude; zero takes the sign that leads away from it, because `bits + 1` stops there.
template <int32_t kUnit>
FASTADV_HD float next_towards(float w, float difference) {
  const int32_t d = bit_cast<int32_t>(difference);
  const int32_t bits = w == 0 ? static_cast<int32_t>(~d & 0x80000000u) : bit_cast<int32_t>(w);
  const int32_t outward = (bits ^ d) >> 31;  // -1 where the magnitude grows, else 0
  return bit_cast<float>(bits - (outward | 1) * kUnit);
}

// round: t rounded to nearest even to R. towards: the next value of R, of which w is one; difference as above.
template <class R>
struct Format;

template <>
struct Format<float> {
  static FASTADV_HD float round(float t) { return t; }
  static FASTADV_HD float towards(float w, float difference) { return next_towards<1>(w, difference); }
};

template <>
struct Format<BFloat16> {
  static FASTADV_HD float round(float t) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    // Two at once is the fast conversion; with 0 for the lower one, its bits are the rounded float's.
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(t), "f"(0.0f));
    return bit_cast<float>(bits);
#else
    const uint32_t bits = bit_cast<uint32_t>(t);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return t != t ? t : bit_cast<float>(rounded);
#endif
  }
  static FASTADV_HD float towards(float w, float difference) { return next_towards<0x10000>(w, difference); }
};

template <>
struct Format<Half> {
  static constexpr float kMax = 65504.0f, kMinNormal = 0x1p-14f, kMinSubnormal = 0x1p-24f;

  static FASTADV_HD float round(float t) {
#ifdef __CUDA_ARCH__
    return __half2float(__float2half_rn(t));
#else
    const uint32_t bits = bit_cast<uint32_t>(t);
    const float normal = bit_cast<float>((bits + 0xfffu + ((bits >> 13) & 1u)) & 0xffffe000u);
    const float subnormal = (t + 0.75f) - 0.75f;  // floats in [0.5, 1) are 2^-24 apart
    const float a = magnitude(t);
    const float rounded = a < kMinNormal ? subnormal : normal;
    const float infinite = t > 0 ? __builtin_inff() : -__builtin_inff();
    return t != t ? t : (a >= 65520.0f ? infinite : rounded);
#endif
  }

  static FASTADV_HD float towards(float w, float difference) {
    const bool up = bit_cast<int32_t>(difference) < 0;  // by its bit: a double's difference may have become -0
    const float subnormal = w + (up ? kMinSubnormal : -kMinSubnormal);
    const float next = magnitude(w) <= kMinNormal ? subnormal : next_towards<0x2000>(w, difference);
    // Past the largest half comes infinity, and back: as a float that is a longer way.
    const float beyond = magnitude(w) > kMax ? kMax : __builtin_inff();
    return magnitude(next) > kMax ? (w > 0 ? beyond : -beyond) : next;
  }
};

template <>
struct Format<double> {
  static FASTADV_HD double round(double t) { return t; }
  static FASTADV_HD double towards(double w, double difference) {
    const int64_t d = bit_cast<int64_t>(difference);
    const int64_t bits = w == 0 ? static_cast<int64_t>(~d & (1ull << 63)) : bit_cast<int64_t>(w);
    return bit_cast<double>(bits - (((bits ^ d) >> 63) | 1));
  }
};

// double to float, inexact results with their last bit set: rounding that again is as good as rounding once.
FASTADV_HD float to_odd_float(double t) {
  const float near = static_cast<float>(t);
  const double back = near;
  uint32_t bits = bit_cast<uint32_t>(near);
  const bool inexact = back != t && t == t;
  bits -= inexact && magnitude(back) > magnitude(t) ? 1 : 0;
  return bit_cast<float>(bits | (inexact ? 1u : 0u));
}

template <class R>
FASTADV_HD float round_to(float t) {
  return Format<R>::round(t);
}
template <class R>
FASTADV_HD double round_to(double t) {
  return Format<R>::round(to_odd_float(t));
}
template <>
FASTADV_HD double round_to<float>(double t) {
  return static_cast<float>(t);
}
template <>
FASTADV_HD double round_to<double>(double t) {
  return t;
}

template <class R, class C>
FASTADV_HD C towards(C w, C difference) {
  return Format<R>::towards(static_cast<float>(w), static_cast<float>(difference));
}
template <>
FASTADV_HD double towards<double>(double w, double difference) {
  return Format<double>::towards(w, difference);
}

// A bound of the box, rounded up or down to R.
template <class R, class C>
FASTADV_HD C round_inward(C bound, bool up) {
  const C w = round_to<R>(bound);
  return (up ? w < bound : w > bound) ? towards<R>(w, static_cast<C>(up ? -1 : 1)) : w;
}

// ---------------------------------------------------------------- loads and stores

// x/255 correctly rounded, by two products and a sum: 1/255 = 2^-8 + 2^-16 + ..., the first terms have so few bits that
// their product with a code is exact, and the rest is 1/255 again, further down.
FASTADV_HD float pixel(uint8_t code, float) {
  const float c = code;
  return c * 0x1.01p-8f + c * static_cast<float>(0x1p-16 / 255);
}
FASTADV_HD double pixel(uint8_t code, double) {
  const double c = code;
  return c * 0x1.0101010101p-8 + c * (0x1p-48 / 255);
}

template <class C, class T>
FASTADV_HD C load(T v) {
  return static_cast<C>(v);
}
template <>
FASTADV_HD float load<float>(uint8_t v) {
  return pixel(v, 0.0f);
}
template <>
FASTADV_HD double load<double>(uint8_t v) {
  return pixel(v, 0.0);
}
template <>
FASTADV_HD float load<float>(BFloat16 v) {
  return bit_cast<float>(static_cast<uint32_t>(v) << 16);
}
template <>
FASTADV_HD float load<float>(Half v) {
#ifdef __CUDA_ARCH__
  return __half2float(bit_cast<__half>(static_cast<uint16_t>(v)));
#else
  const uint32_t bits = static_cast<uint32_t>(v), sign = (bits & 0x8000u) << 16, a = bits & 0x7fffu;
  const float normal = bit_cast<float>((a << 13) + (112u << 23));
  const float subnormal = bit_cast<float>((a << 13) + (113u << 23)) - 0x1p-14f;
  const float infinite = bit_cast<float>((a << 13) | 0x7f800000u);  // and NaN
  const float value = a < 0x400 ? subnormal : (a >= 0x7c00 ? infinite : normal);
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
#endif
}
template <>
FASTADV_HD double load<double>(BFloat16 v) {
  return load<float>(v);
}
template <>
FASTADV_HD double load<double>(Half v) {
  return load<float>(v);
}

// The sign is taken in grad's own dtype: a subnormal double must not become a float's zero.
template <class C, class G>
FASTADV_HD C load_grad(G g) {
  return load<C>(g);
}
template <>
FASTADV_HD float load_grad<float>(double g) {
  return static_cast<float>(g > 0) - static_cast<float>(g < 0);
}

// Stores take a value of R: nothing is rounded any more.
template <class R>
struct Store {
  template <class C>
  static FASTADV_HD R from(C w) {
    return static_cast<R>(w);
  }
};
template <>
struct Store<BFloat16> {
  static FASTADV_HD BFloat16 from(float w) {
    const uint16_t upper = static_cast<uint16_t>(bit_cast<uint32_t>(w) >> 16);
#ifdef __CUDA_ARCH__
    return static_cast<BFloat16>(upper);  // a NaN that an instruction made has its upper bits set
#else
    return static_cast<BFloat16>(w != w ? uint16_t{0x7fc0} : upper);
#endif
  }
  static FASTADV_HD BFloat16 from(double w) { return from(static_cast<float>(w)); }
};
template <>
struct Store<Half> {
  static FASTADV_HD Half from(float w) {
#ifdef __CUDA_ARCH__
    return static_cast<Half>(bit_cast<uint16_t>(__float2half_rn(w)));
#else
    const uint32_t bits = bit_cast<uint32_t>(w), a = bits & 0x7fffffffu;
    const uint32_t normal = (a - (112u << 23)) >> 13;
    const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(magnitude(w) * 0x1p24f));
    const uint32_t finite = a < (113u << 23) ? subnormal : normal;
    const uint32_t value = a > 0x7f800000u ? 0x7e00u : (a == 0x7f800000u ? 0x7c00u : finite);
    return static_cast<Half>(value | ((bits >> 16) & 0x8000u));
#endif
  }
  static FASTADV_HD Half from(double w) { return from(static_cast<float>(w)); }
};

template <class R, class C>
FASTADV_HD R rounded(C v) {
  return Store<R>::from(round_to<R>(v));
}

// ---------------------------------------------------------------- the formulas of contract.md

// Each formula is a value t, which is rounded to R, and then `settled` or clamped: the CPU rounds many at once.

// The value of R, or the one next to it, that is in the ball of that radius around x and in the box, whose bounds are
// values of R. w is a rounded t.
template <class R, class C>
FASTADV_HD C settled(C w, C x, C radius, C lo, C hi) {
  const C difference = w - x;
  w = magnitude(difference) > radius ? towards<R>(w, difference) : w;
  return at_most(at_least(w, lo), hi);
}

// k = 2h - 65535 of an element's 16 random bits h.
template <class C>
FASTADV_HD C noise_level(uint32_t h) {
#ifdef __CUDA_ARCH__
  // Conversions are slow there: the float 2^23 + 2h has 2h for its last bits.
  return static_cast<C>(__uint_as_float(0x4b000000u | (h << 1)) - (8388608.0f + 65535.0f));
#else
  return static_cast<C>(2 * static_cast<int32_t>(h) - 65535);
#endif
}

// One random start; scale = noise * 2^-16.
template <class C>
FASTADV_HD C start_value(C x, uint32_t h, C scale) {
  return x + scale * noise_level<C>(h);
}
template <class R, class C>
FASTADV_HD C start(C x, uint32_t h, C scale, C noise, C lo, C hi) {
  return settled<R>(round_to<R>(start_value(x, h, scale)), x, noise, lo, hi);
}

// alpha * sign(grad); zero = alpha * 0, which is NaN for an alpha that is not finite.
FASTADV_HD float signed_step(float grad, float alpha, float zero) {
  const uint32_t s = bit_cast<uint32_t>(alpha) ^ (bit_cast<uint32_t>(grad) & 0x80000000u);
#ifdef __CUDA_ARCH__
  return grad != 0 && grad == grad ? bit_cast<float>(s) : zero;
#else
  return __builtin_islessgreater(grad, 0.0f) ? bit_cast<float>(s) : zero;
#endif
}
FASTADV_HD double signed_step(double grad, double alpha, double zero) {
  return grad > 0 ? alpha : (grad < 0 ? -alpha : zero);
}

template <bool kProject, class C>
FASTADV_HD C step_value(C x0, C grad, C x, C alpha, C zero, C eps) {
  const C moved = x0 + signed_step(grad, alpha, zero);
  return kProject ? x + at_most(at_least(moved - x, -eps), eps) : moved;
}
template <class R, bool kProject, class C>
FASTADV_HD C step_settled(C w, C x, C eps, C lo, C hi) {
  return kProject ? settled<R>(w, x, eps, lo, hi) : at_most(at_least(w, lo), hi);
}
template <class R, bool kProject, class C>
FASTADV_HD C step(C x0, C grad, C x, C alpha, C zero, C eps, C lo, C hi) {
  return step_settled<R, kProject>(round_to<R>(step_value<kProject>(x0, grad, x, alpha, zero, eps)), x, eps, lo, hi);
}

// The model's next input for the image w; scale = 1/std.
template <class C>
FASTADV_HD C normalized(C w, C mean, C scale) {
  return (w - mean) * scale;
}

}  // namespace fastadv
