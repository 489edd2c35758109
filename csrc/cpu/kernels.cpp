// Plain loops over attack_math.h that the compiler vectorises. FASTADV_ISA names this compilation's instruction set.
// Nothing but the table has linkage: an inline function shared between compilations could end up as the wrong one.
#include "kernels.h"

#include "../attack_math.h"

#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define FASTADV_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTADV_VECTORIZE _Pragma("GCC ivdep")  // out may be an input, element for element: no dependence
#endif

namespace fastadv {
namespace {

// Halves to floats and back by the processor's own conversions, many at once; in plain C++ each takes ten operations,
// and a step took twice as long.
#if defined(__AVX512F__)
constexpr int kHalves = 16;
inline void widen(const Half* from, float* to) {
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
inline void narrow(const float* from, Half* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
constexpr int kHalves = 8;
inline void widen(const Half* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline void narrow(const float* from, Half* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#else
constexpr int kHalves = 1;
inline void widen(const Half* from, float* to) { *to = load<float>(*from); }
inline void narrow(const float* from, Half* to) { *to = rounded<Half>(*from); }
#endif

template <class C, class R>
constexpr bool kByHalves = (kHalves > 1) && (std::is_same_v<C, float>) && (std::is_same_v<R, Half>);

// out[i] = settle(i, value(i) rounded to a half), for up to a tile.
template <class Value, class Settle>
void halves(int64_t n, Half* out, const Value& value, const Settle& settle) {
  alignas(64) float w[kTile];
  alignas(64) Half h[kTile];
  const int64_t whole = (n + kHalves - 1) / kHalves * kHalves;
  FASTADV_VECTORIZE
  for (int64_t i = 0; i < n; ++i) w[i] = value(i);
  for (int64_t i = n; i < whole; ++i) w[i] = 0;
  for (int64_t i = 0; i < whole; i += kHalves) {
    narrow(w + i, h + i);
    widen(h + i, w + i);
  }
  FASTADV_VECTORIZE
  for (int64_t i = 0; i < n; ++i) w[i] = settle(i, w[i]);
  for (int64_t i = 0; i < n / kHalves * kHalves; i += kHalves) narrow(w + i, out + i);
  if (n < whole) {
    narrow(w + whole - kHalves, h);
    __builtin_memcpy(out + whole - kHalves, h, sizeof(Half) * (n - (whole - kHalves)));
  }
}

template <class C, class T, bool kGrad = false>
void load_tile(const void* src, int64_t stride, int64_t n, void* dst) {
  const T* from = static_cast<const T*>(src);
  C* to = static_cast<C*>(dst);
  if constexpr (kByHalves<C, T>) {
    for (; stride == 1 && n >= kHalves; n -= kHalves, from += kHalves, to += kHalves) widen(from, to);
  }
  if (stride == 1) {
    FASTADV_VECTORIZE
    for (int64_t i = 0; i < n; ++i) to[i] = kGrad ? load_grad<C>(from[i]) : load<C>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = kGrad ? load_grad<C>(from[i * stride]) : load<C>(from[i * stride]);
  }
}

// Philox on lanes of 64 bits: one widening multiplication gives both halves of a product. Compilers find that
// instruction only half the time (measured: 2.3x slower without), so it is named where there is one.
#if defined(__AVX512F__)
constexpr int kLanes = 8;
#define FASTADV_WIDE(a, b) (Lanes) _mm512_mul_epu32((__m512i)(a), (__m512i)(b))
#elif defined(__AVX2__)
constexpr int kLanes = 4;
#define FASTADV_WIDE(a, b) (Lanes) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#elif defined(__SSE2__)
constexpr int kLanes = 2;
#define FASTADV_WIDE(a, b) (Lanes) _mm_mul_epu32((__m128i)(a), (__m128i)(b))
#else
constexpr int kLanes = 2;
#define FASTADV_WIDE(a, b) (((a) & 0xffffffffu) * (b))
#endif
typedef uint64_t Lanes __attribute__((vector_size(8 * kLanes)));

// kSets * kLanes groups from `counter` on, the sets interleaved: a round is a chain of its own latencies. The upper
// halves of the lanes hold what no later step looks at.
constexpr int kSets = 4, kGroups = kSets * kLanes;
static_assert(kTile / 8 % kGroups == 0);

inline __attribute__((always_inline)) void random_bits_lanes(uint64_t key, const Lanes* counter, uint64_t* words) {
  const Lanes multiplier0 = Lanes{} + 0xD2511F53u, multiplier1 = Lanes{} + 0xCD9E8D57u;
  Lanes c0[kSets], c1[kSets], c2[kSets] = {}, c3[kSets] = {};
  for (int s = 0; s < kSets; ++s) {
    c0[s] = counter[s];
    c1[s] = counter[s] >> 32;
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  FASTADV_UNROLL
  for (int round = 0; round < 10; ++round) {
    FASTADV_UNROLL
    for (int s = 0; s < kSets; ++s) {
      const Lanes p0 = FASTADV_WIDE(c0[s], multiplier0), p1 = FASTADV_WIDE(c2[s], multiplier1);
      c0[s] = (p1 >> 32) ^ c1[s] ^ k0;
      c1[s] = p1;
      c2[s] = (p0 >> 32) ^ c3[s] ^ k1;
      c3[s] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int s = 0; s < kSets; ++s) {
    const Lanes w01 = (c0[s] & 0xffffffffu) | (c1[s] << 32), w23 = (c2[s] & 0xffffffffu) | (c3[s] << 32);
    for (int i = 0; i < kLanes; ++i) {
      words[2 * (s * kLanes + i)] = w01[i];
      words[2 * (s * kLanes + i) + 1] = w23[i];
    }
  }
}

void random_bits_tile(uint64_t key, uint64_t first, int64_t groups, uint64_t* words, Ahead ahead) {
  constexpr int64_t kCacheLine = 64;
  Lanes counter[kSets];
  for (int i = 0; i < kGroups; ++i) counter[i / kLanes][i % kLanes] = first + i;
  for (int64_t i = 0; i < groups; i += kGroups) {
    for (int s = 0; s < 2; ++s) {
      const int64_t bytes = ahead.bytes_per_group[s];
      for (int64_t b = i * bytes; b < (i + kGroups) * bytes; b += kCacheLine) __builtin_prefetch(ahead.streams[s] + b);
    }
    random_bits_lanes(key, counter, words + 2 * i);
    for (Lanes& c : counter) c += kGroups;
  }
}

// A parameter: one value, or one per element.
template <class C>
struct Uniform {
  const C value;
  explicit Uniform(const void* p) : value(*static_cast<const C*>(p)) {}
  C operator[](int64_t) const { return value; }
};
template <class C>
struct Array {
  const C* const p;
  explicit Array(const void* p) : p(static_cast<const C*>(p)) {}
  C operator[](int64_t i) const { return p[i]; }
};

template <class C, class R, template <class> class Parameter>
void start_tile(int64_t n, const void* x, const uint16_t* bits, const void* noise, const void* lo, const void* hi,
                void* out) {
  const Parameter<C> noise_(noise), lo_(lo), hi_(hi);
  const C* x_ = static_cast<const C*>(x);
  R* out_ = static_cast<R*>(out);
  const auto scale = [&](int64_t i) { return noise_[i] * static_cast<C>(0x1p-16); };
  if constexpr (kByHalves<C, R>) {
    halves(
        n, out_, [&](int64_t i) { return start_value(x_[i], bits[i], scale(i)); },
        [&](int64_t i, float w) { return settled<R>(w, x_[i], noise_[i], lo_[i], hi_[i]); });
  } else {
    FASTADV_VECTORIZE
    for (int64_t i = 0; i < n; ++i)
      out_[i] = Store<R>::from(start<R>(x_[i], bits[i], scale(i), noise_[i], lo_[i], hi_[i]));
  }
}

template <class C, class R, template <class> class Parameter, bool kProject>
void step_tile(int64_t n, const void* x0, const void* grad, const void* x, const void* alpha, const void* eps,
               const void* lo, const void* hi, void* out) {
  const Parameter<C> alpha_(alpha), eps_(eps), lo_(lo), hi_(hi);
  const C *x0_ = static_cast<const C*>(x0), *grad_ = static_cast<const C*>(grad), *x_ = static_cast<const C*>(x);
  R* out_ = static_cast<R*>(out);
  if constexpr (kByHalves<C, R>) {
    halves(
        n, out_,
        [&](int64_t i) { return step_value<kProject>(x0_[i], grad_[i], x_[i], alpha_[i], alpha_[i] * 0, eps_[i]); },
        [&](int64_t i, float w) { return step_settled<R, kProject>(w, x_[i], eps_[i], lo_[i], hi_[i]); });
  } else {
    FASTADV_VECTORIZE
    for (int64_t i = 0; i < n; ++i)
      out_[i] =
          Store<R>::from(step<R, kProject>(x0_[i], grad_[i], x_[i], alpha_[i], alpha_[i] * 0, eps_[i], lo_[i], hi_[i]));
  }
}

template <class C, class R>
void round_inward_tile(int64_t n, void* lo, void* hi) {
  C *lo_ = static_cast<C*>(lo), *hi_ = static_cast<C*>(hi);
  for (int64_t i = 0; i < n; ++i) {
    lo_[i] = round_inward<R>(lo_[i], true);
    hi_[i] = round_inward<R>(hi_[i], false);
  }
}

template <class C, class Z, template <class> class Parameter>
void normalize_tile(int64_t n, const void* w, const void* mean, const void* scale, void* z) {
  const Parameter<C> mean_(mean), scale_(scale);
  const C* w_ = static_cast<const C*>(w);
  Z* z_ = static_cast<Z*>(z);
  const auto value = [&](int64_t i) { return normalized(w_[i], mean_[i], scale_[i]); };
  if constexpr (kByHalves<C, Z>) {
    halves(n, z_, value, [](int64_t, float v) { return v; });
  } else {
    FASTADV_VECTORIZE
    for (int64_t i = 0; i < n; ++i) z_[i] = rounded<Z>(value(i));
  }
}

#define FASTADV_ROW_OF(ROW, C) {ROW(C, double), ROW(C, float), ROW(C, Half), ROW(C, BFloat16)}
#define FASTADV_TABLE_OF(ROW) {FASTADV_ROW_OF(ROW, double), FASTADV_ROW_OF(ROW, float)}
#define FASTADV_START(C, R) {start_tile<C, R, Uniform>, start_tile<C, R, Array>}
#define FASTADV_STEP(C, R)                                               \
  {                                                                      \
    {step_tile<C, R, Uniform, false>, step_tile<C, R, Uniform, true>}, { \
      step_tile<C, R, Array, false>, step_tile<C, R, Array, true>        \
    }                                                                    \
  }
#define FASTADV_INWARD(C, R) round_inward_tile<C, R>
#define FASTADV_NORMALIZE(C, Z) {normalize_tile<C, Z, Uniform>, normalize_tile<C, Z, Array>}
#define FASTADV_GRAD(C, G) load_tile<C, G, true>
#define FASTADV_LOAD(C) \
  {load_tile<C, double>, load_tile<C, float>, load_tile<C, Half>, load_tile<C, BFloat16>, load_tile<C, uint8_t>}

}  // namespace

#define FASTADV_JOIN(a, b) a##b
#define FASTADV_NAME(isa) FASTADV_JOIN(kernels_, isa)
#define FASTADV_TEXT(isa) FASTADV_TEXT_(isa)
#define FASTADV_TEXT_(isa) #isa

extern const Kernels FASTADV_NAME(FASTADV_ISA) = {
    FASTADV_TEXT(FASTADV_ISA),        {FASTADV_LOAD(double), FASTADV_LOAD(float)},
    FASTADV_TABLE_OF(FASTADV_GRAD),   random_bits_tile,
    FASTADV_TABLE_OF(FASTADV_START),  FASTADV_TABLE_OF(FASTADV_STEP),
    FASTADV_TABLE_OF(FASTADV_INWARD), FASTADV_TABLE_OF(FASTADV_NORMALIZE),
};

}  // namespace fastadv
