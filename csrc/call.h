// One call of an op, as both native libraries get it from library.cpp.
#pragma once

#include "target.h"
#include "tensors.h"

namespace fastadv {

// The operands of a call: images, parameters, and the model's next input z. One that the op lacks has no data. A
// parameter without data is a number, in Call::numbers.
enum Slot : int { kX, kIterate, kGrad, kOut, kAlpha, kEps, kNoise, kLo, kHi, kZ, kSlots };

// z = (w - mean[c]) * scale[c] of the result w, in the compute type. An element's channel c is position / inner %
// count, with its position in its block: inner is 1024 for a contiguous (N, 3, 32, 32) tensor, 1 in channels-last
// layout.
struct Channels {
  const void* mean = nullptr;
  const void* scale = nullptr;
  int64_t count = 1, inner = 1;
};

struct Call {
  Layout<kSlots> layout;
  double numbers[kSlots] = {};
  bool has_noise = false;  // fgsm_step starts at random_init's result
  bool project = true;
  uint64_t seed = 0;               // where there is no tensor
  const int64_t* seeds = nullptr;  // one, or one per block of the layout
  Channels channels;

  FASTADV_HD DType dtype(Slot s) const { return layout.operands[s].dtype; }
  FASTADV_HD bool has(Slot s) const { return layout.operands[s].data != nullptr; }
  bool any_float64() const {
    for (Slot s : {kX, kIterate, kOut})
      if (has(s) && dtype(s) == DType::kFloat64) return true;
    return false;
  }
};

// Each library defines these for its device; `stream` is CUDA's, null on the CPU. They may throw std::exception.
void random_init(const Call& call, void* stream);
void fgsm_step(const Call& call, void* stream);
void pgd_step(const Call& call, void* stream);
// int64 arrays of n: key = seed, counter = (index low, index high, restart, word3); words: [n, 4].
void philox_words(int64_t n, const int64_t* seed, const int64_t* index, const int64_t* restart, uint32_t word3,
                  int64_t* words, void* stream);

}  // namespace fastadv
