// One call of an op, as both native libraries get it from library.cpp.
#pragma once

#include "target.h"
#include "tensors.h"

namespace fastadv {

// Images, then parameters, then the model's next input. An operand without data is not there: a parameter is then its
// number.
enum Slot : int { kX, kIterate, kGrad, kOut, kAlpha, kEps, kNoise, kLo, kHi, kZ, kSlots };

// What makes z of the image, in the compute type: (w - mean) * scale. The element at a position of its block takes
// number position / inner % count.
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
