// The fast path's arithmetic, on pairs of neighbouring elements. Two bf16 neighbours fill one register:
//
//     element      0     1     2     3              a Word holds elements 2i (low bits) and 2i + 1 (high bits),
//     register   [ x0 | x1 ] [ x2 | x3 ]            a Pair the same two as floats
//
// The results are attack_math.h's. The instructions differ, because an SM issues additions and multiplications at twice
// the rate of comparisons, selections, logic and integer operations: where attack_math.h selects a value or changes its
// bits, the code here adds under a predicate.
//
// These functions need radii (eps, noise) that are 0 or of an ordinary size (ops.cu checks it). Then a value that has
// to be pulled back into the ball is never infinite, and in all types but half never zero or subnormal.
#pragma once

#include "../attack_math.h"

namespace fastadv {

struct Pair {
  float a, b;
};

// ---------------------------------------------------------------- a pair as it is stored

template <class T>
struct Two;

template <>
struct Two<float> {
  using Word = Pair;
  static FASTADV_HD void set(Word& w, int j, float v) { (j ? w.b : w.a) = v; }
  static FASTADV_HD float get(Word w, int j) { return j ? w.b : w.a; }
  static FASTADV_HD Pair widen(Word w) { return w; }
  static FASTADV_HD Word narrow(Pair v) { return v; }
  static FASTADV_HD Word at_least(Word v, Word bound) {
    return {fastadv::at_least(v.a, bound.a), fastadv::at_least(v.b, bound.b)};
  }
  static FASTADV_HD Word at_most(Word v, Word bound) {
    return {fastadv::at_most(v.a, bound.a), fastadv::at_most(v.b, bound.b)};
  }
};

template <>
struct Two<double> {  // as the model's input only
  struct Word {
    double a, b;
  };
  static FASTADV_HD double get(Word w, int j) { return j ? w.b : w.a; }
  static FASTADV_HD Word narrow(Pair v) { return {v.a, v.b}; }
};

template <>
struct Two<uint8_t> {
  using Word = uint16_t;
  static FASTADV_HD void set(Word& w, int j, uint8_t v) { w |= static_cast<Word>(v << 8 * j); }
  static FASTADV_HD Pair widen(Word w) {
    return {load<float>(static_cast<uint8_t>(w)), load<float>(static_cast<uint8_t>(w >> 8))};
  }
};

// Half and bfloat16 differ in the names of their instructions alone. This is the code without a GPU, by attack_math.h.
template <class T>
struct TwoHalves {
  using Word = uint32_t;
  static FASTADV_HD void set(Word& w, int j, T v) { w |= static_cast<Word>(v) << 16 * j; }
  static FASTADV_HD T get(Word w, int j) { return static_cast<T>(w >> 16 * j & 0xffffu); }
  static FASTADV_HD Pair widen(Word w) {
    return {load<float>(static_cast<T>(w & 0xffffu)), load<float>(static_cast<T>(w >> 16))};
  }
  static FASTADV_HD Word narrow(Pair v) {
    return static_cast<uint32_t>(rounded<T>(v.a)) | static_cast<uint32_t>(rounded<T>(v.b)) << 16;
  }
  static FASTADV_HD Word at_least(Word v, Word bound) { return narrow(Two<float>::at_least(widen(v), widen(bound))); }
  static FASTADV_HD Word at_most(Word v, Word bound) { return narrow(Two<float>::at_most(widen(v), widen(bound))); }
};
template <>
struct Two<Half> : TwoHalves<Half> {};
template <>
struct Two<BFloat16> : TwoHalves<BFloat16> {};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define FASTADV_HALVES(T, type)                                                            \
  template <>                                                                              \
  __device__ __forceinline__ uint32_t TwoHalves<T>::narrow(Pair v) {                       \
    uint32_t w;                                                                            \
    asm("cvt.rn." type ".f32 %0, %1, %2;" : "=r"(w) : "f"(v.b), "f"(v.a));                 \
    return w;                                                                              \
  }                                                                                        \
  template <>                                                                              \
  __device__ __forceinline__ uint32_t TwoHalves<T>::at_least(uint32_t v, uint32_t bound) { \
    uint32_t w;                                                                            \
    asm("max.NaN." type " %0, %1, %2;" : "=r"(w) : "r"(v), "r"(bound));                    \
    return w;                                                                              \
  }                                                                                        \
  template <>                                                                              \
  __device__ __forceinline__ uint32_t TwoHalves<T>::at_most(uint32_t v, uint32_t bound) {  \
    uint32_t w;                                                                            \
    asm("min.NaN." type " %0, %1, %2;" : "=r"(w) : "r"(v), "r"(bound));                    \
    return w;                                                                              \
  }
FASTADV_HALVES(Half, "f16x2")
FASTADV_HALVES(BFloat16, "bf16x2")
#undef FASTADV_HALVES

template <>
__device__ __forceinline__ Pair TwoHalves<BFloat16>::widen(uint32_t w) {
  return {__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u)};
}
#endif

// ---------------------------------------------------------------- additions under predicates

// v - step where test > limit, v + step where test < -limit, else v.
FASTADV_HD void nudge(float& v, float test, float limit, float step) {
#ifdef __CUDA_ARCH__
  asm("{\n"
      " .reg .pred above, below;\n"
      " setp.gt.f32 above, %1, %2;\n"
      " setp.lt.f32 below, %1, %3;\n"
      " @above sub.rn.f32 %0, %0, %4;\n"
      " @below add.rn.f32 %0, %0, %4;\n"
      "}"
      : "+f"(v)
      : "f"(test), "f"(limit), "f"(-limit), "f"(step));
#else
  if (test > limit)
    v -= step;
  else if (test < -limit)
    v += step;
#endif
}

// ---------------------------------------------------------------- a step along the gradient's sign

// v + alpha * sign(grad), but that a zero's sign stays.
template <class G>
FASTADV_HD void push(Pair& v, typename Two<G>::Word grad, float alpha) {
  const Pair g = Two<G>::widen(grad);
  nudge(v.a, g.a, 0.0f, -alpha);
  nudge(v.b, g.b, 0.0f, -alpha);
}

#ifdef __CUDA_ARCH__
#define FASTADV_PUSH(type)                    \
  asm("{\n"                                   \
      " .reg .pred up0, up1, down0, down1;\n" \
      " .reg .b32 zero;\n"                    \
      " mov.b32 zero, 0;\n"                   \
      " setp.gt." type                        \
      " up0|up1, %2, zero;\n"                 \
      " setp.lt." type                        \
      " down0|down1, %2, zero;\n"             \
      " @up0 add.rn.f32 %0, %0, %3;\n"        \
      " @up1 add.rn.f32 %1, %1, %3;\n"        \
      " @down0 sub.rn.f32 %0, %0, %3;\n"      \
      " @down1 sub.rn.f32 %1, %1, %3;\n"      \
      "}"                                     \
      : "+f"(v.a), "+f"(v.b)                  \
      : "r"(grad), "f"(alpha))

template <>
__device__ __forceinline__ void push<Half>(Pair& v, uint32_t grad, float alpha) {
  FASTADV_PUSH("f16x2");
}
#if __CUDA_ARCH__ >= 900
template <>
__device__ __forceinline__ void push<BFloat16>(Pair& v, uint32_t grad, float alpha) {
  FASTADV_PUSH("bf16x2");
}
#endif
#undef FASTADV_PUSH
#endif

// ---------------------------------------------------------------- back into the ball

// Between half and three quarters of the way to w's neighbours if w is a power of two, and up to three halves of it
// below the next one: rounded, w moved by that is its neighbour in R, on either side.
template <class R>
FASTADV_HD float to_neighbour(float w);
template <>
FASTADV_HD float to_neighbour<BFloat16>(float w) {
  return magnitude(w) * (0.6f * 0x1p-7f);
}
template <>
FASTADV_HD float to_neighbour<Half>(float w) {  // the subnormal ones are 2^-24 apart
  const float normal = magnitude(w) * (0.6f * 0x1p-10f), subnormal = 0.6f * 0x1p-24f;
  return subnormal > normal ? subnormal : normal;
}

// Moves w, a value of R outside the ball around x, to where rounding makes it the next one towards x.
template <class R>
FASTADV_HD void pull(float& w, float x, float radius) {
  nudge(w, w - x, radius, to_neighbour<R>(w));
}

// For floats the machine does the rounding: less the least of all, rounded down, is the next one.
template <>
FASTADV_HD void pull<float>(float& w, float x, float radius) {
  const float difference = w - x;
#ifdef __CUDA_ARCH__
  asm("{\n"
      " .reg .pred above, below;\n"
      " setp.gt.f32 above, %1, %2;\n"
      " setp.lt.f32 below, %1, %3;\n"
      " @above sub.rm.f32 %0, %0, 0f00000001;\n"
      " @below add.rp.f32 %0, %0, 0f00000001;\n"
      "}"
      : "+f"(w)
      : "f"(difference), "f"(radius), "f"(-radius));
#else
  if (magnitude(difference) > radius) w = next_towards<1>(w, difference);
#endif
}

// ---------------------------------------------------------------- the formulas of contract.md

struct Box {
  float lo, hi;  // values of R
};

template <class R>
FASTADV_HD typename Two<R>::Word into_box(typename Two<R>::Word w, Box box) {
  return Two<R>::at_most(Two<R>::at_least(w, Two<R>::narrow({box.lo, box.lo})), Two<R>::narrow({box.hi, box.hi}));
}

template <class R>
FASTADV_HD typename Two<R>::Word finish(Pair t, Pair x, float radius, Box box) {
  Pair w = Two<R>::widen(Two<R>::narrow(t));
  pull<R>(w.a, x.a, radius);
  pull<R>(w.b, x.b, radius);
  return into_box<R>(Two<R>::narrow(w), box);
}

// k / 2 = h - 32767.5 of the lower or upper 16 bits: as a float's last bits, because conversions are slow.
FASTADV_HD Pair half_noise_levels(uint32_t bits) {
#ifdef __CUDA_ARCH__
  const uint32_t a = __byte_perm(bits, 0x4b00u, 0x5410u), b = __byte_perm(bits, 0x4b00u, 0x5432u);
#else
  const uint32_t a = 0x4b000000u | (bits & 0xffffu), b = 0x4b000000u | bits >> 16;
#endif
  return {(bit_cast<float>(a) - 0x1p23f) - 32767.5f, (bit_cast<float>(b) - 0x1p23f) - 32767.5f};
}

template <class R>
FASTADV_HD typename Two<R>::Word start(Pair x, uint32_t bits, float noise, Box box) {
  const float scale = noise * 0x1p-15f;
  const Pair k = half_noise_levels(bits);
  return finish<R>({x.a + scale * k.a, x.b + scale * k.b}, x, noise, box);
}

template <class R, class G, bool kProject>
FASTADV_HD typename Two<R>::Word step(Pair x0, typename Two<G>::Word grad, Pair x, float alpha, float eps, Box box) {
  if (!kProject) x0 = {x0.a + 0.0f, x0.b + 0.0f};  // -0 moved by nothing is 0, which the ball would see to
  push<G>(x0, grad, alpha);
  if (!kProject) return into_box<R>(Two<R>::narrow(x0), box);
  const float a = at_most(at_least(x0.a - x.a, -eps), eps), b = at_most(at_least(x0.b - x.b, -eps), eps);
  return finish<R>({x.a + a, x.b + b}, x, eps, box);
}

}  // namespace fastadv
