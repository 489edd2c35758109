// The CPU's ops: cut the layout into tiles, bring each operand into the compute type, run the inner loops, put the
// result where it belongs. An operand that lies as the loops want it is used in place.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../call.h"
#include "../philox.h"
#include "isa.h"

namespace fastadv {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread takes at least: PyTorch's own choice

template <class C>
constexpr int kComputeIndex = sizeof(C) == 8 ? 0 : 1;
template <class C>
constexpr DType kComputeType = sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32;

int index_of(DType t) { return static_cast<int>(t); }

// Elements [position, position + count) of a block.
struct Tile {
  int64_t block, position, count;
};

using LayoutOf = Layout<kSlots>;

bool in_place(const LayoutOf& layout, Slot slot, DType dtype) {
  const Operand& op = layout.operands[slot];
  return op.dtype == dtype && layout.flat() && (layout.dims == 0 || op.strides[0] == 1);
}

char* address(const LayoutOf& layout, Slot slot, const Tile& tile) {
  const Operand& op = layout.operands[slot];
  const int64_t stride = layout.dims ? op.strides[0] : 0;
  return op.data + (tile.block * op.block_stride + tile.position * stride) * size_of(op.dtype);
}

void* at(void* data, int64_t i, DType type) { return static_cast<char*>(data) + i * size_of(type); }

// Calls run(pointer, stride, count) for the tile's pieces along the innermost dimension, in order.
template <class Run>
void for_runs(const LayoutOf& layout, Slot slot, const Tile& tile, const Run& run) {
  const Operand& op = layout.operands[slot];
  if (layout.flat()) return run(address(layout, slot, tile), layout.dims ? op.strides[0] : 0, tile.count);
  int64_t at[kMaxDims], offset = tile.block * op.block_stride, rest = tile.position;
  for (int d = layout.dims - 1; d >= 0; --d) {
    at[d] = rest % layout.sizes[d];
    rest /= layout.sizes[d];
    offset += at[d] * op.strides[d];
  }
  const int inner = layout.dims - 1;
  for (int64_t left = tile.count; left > 0;) {
    const int64_t count = std::min(left, layout.sizes[inner] - at[inner]);
    run(op.data + offset * size_of(op.dtype), op.strides[inner], count);
    left -= count;
    at[inner] += count;
    offset += count * op.strides[inner];
    for (int d = inner; d > 0 && at[d] == layout.sizes[d]; --d) {
      offset += op.strides[d - 1] - layout.sizes[d] * op.strides[d];
      at[d] = 0;
      ++at[d - 1];
    }
  }
}

using Load = void (*)(const void*, int64_t, int64_t, void*);

template <class C>
void gather(const LayoutOf& layout, Slot slot, const Tile& tile, Load load, C* to) {
  for_runs(layout, slot, tile, [&](const char* from, int64_t stride, int64_t count) {
    load(from, stride, count, to);
    to += count;
  });
}

template <class C>
const C* fetch(const Call& call, Slot slot, const Tile& tile, C* buffer) {
  if (in_place(call.layout, slot, kComputeType<C>)) return reinterpret_cast<const C*>(address(call.layout, slot, tile));
  const int c = kComputeIndex<C>, type = index_of(call.dtype(slot));
  gather(call.layout, slot, tile, slot == kGrad ? isa().load_grad[c][type] : isa().load[c][type], buffer);
  return buffer;
}

// Where a tile's result goes: the operand itself, or a buffer whose contents done() then spreads over it.
class Result {
 public:
  Result(const Call& call, Slot slot, const Tile& tile, void* buffer)
      : call_(call), slot_(slot), tile_(tile), buffer_(buffer) {
    direct_ = in_place(call.layout, slot, call.dtype(slot));
  }
  void* data() const { return direct_ ? address(call_.layout, slot_, tile_) : buffer_; }
  void done() const {
    if (direct_) return;
    switch (size_of(call_.dtype(slot_))) {
      case 8:
        return scatter<uint64_t>();
      case 4:
        return scatter<uint32_t>();
      default:
        return scatter<uint16_t>();
    }
  }

 private:
  template <class Bits>
  void scatter() const {
    const Bits* from = static_cast<const Bits*>(buffer_);
    for_runs(call_.layout, slot_, tile_, [&](char* to, int64_t stride, int64_t count) {
      for (int64_t i = 0; i < count; ++i) reinterpret_cast<Bits*>(to)[i * stride] = from[i];
      from += count;
    });
  }

  const Call& call_;
  Slot slot_;
  const Tile& tile_;
  void* buffer_;
  bool direct_;
};

// The model's next input, from a tile's result while that is in the cache.
template <class C>
class ModelInput {
 public:
  explicit ModelInput(const Call& call) : call_(call), period_(call.channels.count * call.channels.inner) {
    if (!call.has(kZ) || period_ > kTile) return;
    const int64_t needed = std::min<int64_t>(call.layout.block_size, kTile) + period_;
    for_channels(0, needed, [&](int64_t i, int64_t n, const C* mean, const C* scale) {
      std::fill_n(mean_ + i, n, *mean);
      std::fill_n(scale_ + i, n, *scale);
    });
  }

  // image: the tile's result, of out's type.
  void run(const Tile& tile, const void* image) {
    if (!call_.has(kZ)) return;
    const int c = kComputeIndex<C>, result = index_of(call_.dtype(kOut)), type = index_of(call_.dtype(kZ));
    const C* w = static_cast<const C*>(image);
    if (call_.dtype(kOut) != kComputeType<C>) {
      isa().load[c][result](image, 1, tile.count, w_);
      w = w_;
    }
    const Result z(call_, kZ, tile, z_);
    const auto& normalize = isa().normalize[c][type];  // [arrays]
    if (period_ <= kTile) {
      const int64_t phase = tile.position % period_;
      normalize[true](tile.count, w, mean_ + phase, scale_ + phase, z.data());
    } else {
      for_channels(tile.position, tile.count, [&](int64_t i, int64_t n, const C* mean, const C* scale) {
        normalize[false](n, w + i, mean, scale, at(z.data(), i, call_.dtype(kZ)));
      });
    }
    z.done();
  }

 private:
  // Calls run(i, n, mean, scale) for the stretches of one channel among `count` elements from `position` on.
  template <class Run>
  void for_channels(int64_t position, int64_t count, const Run& run) const {
    const Channels& all = call_.channels;
    const C *mean = static_cast<const C*>(all.mean), *scale = static_cast<const C*>(all.scale);
    int64_t channel = position / all.inner % all.count, left = all.inner - position % all.inner;
    for (int64_t i = 0; i < count; i += left, left = all.inner, channel = channel + 1 < all.count ? channel + 1 : 0)
      run(i, std::min(left, count - i), mean + channel, scale + channel);
  }

  const Call& call_;
  const int64_t period_;  // where it is short, arrays of it serve every tile, from another phase on
  alignas(64) C mean_[2 * kTile], scale_[2 * kTile], w_[kTile];
  alignas(64) uint64_t z_[kTile];
};

// A call, and its layout as it was made: in `call` dimensions that the parameters alone keep apart are merged.
struct Job {
  const Call& call;
  const LayoutOf& parameters;
};

// Merges neighbouring dimensions where the images allow it, so that they lie as the loops want them.
void merge_images(LayoutOf& layout) {
  int last = 0;
  for (int d = 1; d < layout.dims; ++d) {
    bool merge = true;
    for (Slot slot : {kX, kIterate, kGrad, kOut, kZ}) {
      const Operand& op = layout.operands[slot];
      merge = merge && (!op.data || op.strides[last] == op.strides[d] * layout.sizes[d]);
    }
    last += !merge;
    layout.sizes[last] = merge ? layout.sizes[last] * layout.sizes[d] : layout.sizes[d];
    for (Operand& op : layout.operands) op.strides[last] = op.strides[d];
  }
  layout.dims = std::min(layout.dims, last + 1);
}

// Parameters in the compute type: for a stretch in which none changes one value each, where that is long enough, else
// an array of a tile. First what enters every sum (noise, alpha), last the box.
template <class C, Slot... slots>
class Parameters {
  static constexpr Slot kNames[] = {slots...};
  static constexpr int kCount = sizeof...(slots);
  static constexpr int64_t kShortest = 64;

 public:
  Parameters(const Job& job, DType result) : job_(job), result_(result) {
    for (Slot slot : kNames) tensors_ = tensors_ || job.call.has(slot);
    const LayoutOf& layout = job.parameters;
    for (int d = layout.dims - 1; d >= 0 && same_along(d); --d) stretch_ *= layout.sizes[d];
    arrays_ = tensors_ && stretch_ < std::min(kShortest, layout.block_size);
    if (!tensors_) load({0, 0, 1});
  }

  // Calls run(i, count, arrays) for the tile's stretches, each with its values in place.
  template <class Run>
  void for_stretches(const Tile& tile, const Run& run) {
    if (!tensors_) return run(0, tile.count, false);
    if (arrays_) {
      load(tile);
      return run(0, tile.count, true);
    }
    for (int64_t i = 0, count; i < tile.count; i += count) {
      const int64_t position = tile.position + i, number = position / stretch_;
      count = std::min((number + 1) * stretch_ - position, tile.count - i);
      if (block_ != tile.block || number_ != number) load({tile.block, position, 1});
      block_ = tile.block;
      number_ = number;
      run(i, count, false);
    }
  }

  const C* operator[](int k) const { return v_[k]; }

 private:
  bool same_along(int d) const {
    for (Slot slot : kNames)
      if (job_.call.has(slot) && job_.parameters.operands[slot].strides[d] != 0) return false;
    return true;
  }

  void load(const Tile& tile) {
    for (int k = 0; k < kCount; ++k) {
      const Slot slot = kNames[k];
      if (job_.call.has(slot))
        gather(job_.parameters, slot, tile, isa().load[kComputeIndex<C>][index_of(job_.call.dtype(slot))], v_[k]);
      else
        std::fill_n(v_[k], tile.count, static_cast<C>(job_.call.numbers[slot]));
    }
    if (tensors_) keep_nan(tile.count);
    isa().round_inward[kComputeIndex<C>][index_of(result_)](tile.count, v_[kCount - 2], v_[kCount - 1]);
  }

  // A NaN in any parameter makes the result NaN: carried by the first, which enters every sum.
  void keep_nan(int64_t n) {
    for (int k = 1; k < kCount; ++k) {
      if (kNames[k] == kEps && !job_.call.project) continue;
      for (int64_t i = 0; i < n; ++i) v_[0][i] = v_[k][i] != v_[k][i] ? v_[k][i] : v_[0][i];
    }
  }

  const Job job_;
  const DType result_;
  bool tensors_ = false, arrays_ = false;
  int64_t stretch_ = 1, block_ = -1, number_ = -1;  // how long one is, and the one whose values are there
  alignas(64) C v_[kCount][kTile];
};

template <class C>
using StartParameters = Parameters<C, kNoise, kLo, kHi>;
template <class C>
using StepParameters = Parameters<C, kAlpha, kEps, kLo, kHi>;

// random_init of a tile into `out`, which takes values of type `result`.
template <class C>
class Start {
 public:
  Start(const Job& job, DType result) : call_(job.call), result_(result), params_(job, result) {}

  void run(const Tile& tile, void* out) {
    const uint64_t seed = call_.seeds ? static_cast<uint64_t>(call_.seeds[tile.block]) : call_.seed;
    isa().random_bits(seed, static_cast<uint64_t>(tile.position) / 8, (tile.count + 7) / 8, words_,
                      {{ahead(kX, tile), ahead(kGrad, tile)}, {ahead_bytes(kX), ahead_bytes(kGrad)}});
    const C* x = fetch(call_, kX, tile, x_);
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(words_);
    const auto& start = isa().start[kComputeIndex<C>][index_of(result_)];  // [arrays]
    params_.for_stretches(tile, [&](int64_t i, int64_t n, bool arrays) {
      start[arrays](n, x + i, bits + i, params_[0], params_[1], params_[2], at(out, i, result_));
    });
  }

 private:
  bool is_ahead(Slot slot) const { return call_.has(slot) && in_place(call_.layout, slot, call_.dtype(slot)); }
  const char* ahead(Slot slot, const Tile& tile) const {
    return is_ahead(slot) ? address(call_.layout, slot, tile) : nullptr;
  }
  int64_t ahead_bytes(Slot slot) const { return is_ahead(slot) ? 8 * size_of(call_.dtype(slot)) : 0; }

  const Call& call_;
  DType result_;
  StartParameters<C> params_;
  alignas(64) uint64_t words_[kTile / 4];
  alignas(64) C x_[kTile];
};

template <class C>
class Step {
 public:
  explicit Step(const Job& job) : call_(job.call), params_(job, call_.dtype(kOut)), input_(call_) {}

  // x0: the tile's start in the compute type, or null: then it is the operand kIterate, and kX where there is none.
  void operator()(const Tile& tile) { run(tile, nullptr); }

  void run(const Tile& tile, const C* x0) {
    const DType type = call_.dtype(kOut);
    const C* x = fetch(call_, kX, tile, x_);
    if (!x0) x0 = call_.has(kIterate) ? fetch(call_, kIterate, tile, x0_) : x;
    const C* grad = fetch(call_, kGrad, tile, grad_);
    const Result result(call_, kOut, tile, out_);
    const auto& step = isa().step[kComputeIndex<C>][index_of(type)];  // [arrays][project]
    params_.for_stretches(tile, [&](int64_t i, int64_t n, bool arrays) {
      step[arrays][call_.project](n, x0 + i, grad + i, x + i, params_[0], params_[1], params_[2], params_[3],
                                  at(result.data(), i, type));
    });
    result.done();
    input_.run(tile, result.data());
  }

 private:
  const Call& call_;
  StepParameters<C> params_;
  ModelInput<C> input_;
  alignas(64) C x_[kTile], x0_[kTile], grad_[kTile];
  alignas(64) uint64_t out_[kTile];
};

// A worker for each thread's share of the tiles, on PyTorch's threads.
template <class Worker>
void for_tiles(const Job& job) {
  const Call& call = job.call;
  const int64_t size = call.layout.block_size, per_block = (size + kTile - 1) / kTile;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min<int64_t>(size, kTile));
  torch::stable::parallel_for(0, call.layout.blocks * per_block, grain, [&](int64_t begin, int64_t end) {
    Worker worker(job);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t position = i % per_block * kTile;
      worker(Tile{i / per_block, position, std::min<int64_t>(kTile, size - position)});
    }
  });
}

template <class C>
class RandomInit {
 public:
  explicit RandomInit(const Job& job) : call_(job.call), start_(job, call_.dtype(kOut)), input_(call_) {}

  void operator()(const Tile& tile) {
    const Result result(call_, kOut, tile, out_);
    start_.run(tile, result.data());
    result.done();
    input_.run(tile, result.data());
  }

 private:
  const Call& call_;
  Start<C> start_;
  ModelInput<C> input_;
  alignas(64) uint64_t out_[kTile];
};

// FGSM from a random start. The start is what random_init returns: in x's dtype (float32 for uint8) and in its compute
// type, C0, which is not C where only out is float64.
template <class C0, class C>
class StepFromNoise {
 public:
  explicit StepFromNoise(const Job& job)
      : type_(job.call.dtype(kX) == DType::kUInt8 ? DType::kFloat32 : job.call.dtype(kX)),
        start_(job, type_),
        step_(job) {}

  void operator()(const Tile& tile) {
    start_.run(tile, stored_);
    if (type_ == kComputeType<C>) return step_.run(tile, reinterpret_cast<const C*>(stored_));
    isa().load[kComputeIndex<C>][index_of(type_)](stored_, 1, tile.count, x0_);
    step_.run(tile, x0_);
  }

 private:
  DType type_;
  Start<C0> start_;
  Step<C> step_;
  alignas(64) uint64_t stored_[kTile];
  alignas(64) C x0_[kTile];
};

void start(const Job& job) {
  job.call.any_float64() ? for_tiles<RandomInit<double>>(job) : for_tiles<RandomInit<float>>(job);
}

void take_step(const Job& job) { job.call.any_float64() ? for_tiles<Step<double>>(job) : for_tiles<Step<float>>(job); }

void start_and_step(const Job& job) {
  if (!job.call.any_float64()) return for_tiles<StepFromNoise<float, float>>(job);
  job.call.dtype(kX) == DType::kFloat64 ? for_tiles<StepFromNoise<double, double>>(job)
                                        : for_tiles<StepFromNoise<float, double>>(job);
}

void run(const Call& call, void (*op)(const Job&)) {
  if (call.layout.flat()) return op({call, call.layout});
  Call merged = call;
  merge_images(merged.layout);
  op({merged, call.layout});
}

}  // namespace

void random_init(const Call& call, void*) { run(call, start); }
void pgd_step(const Call& call, void*) { run(call, take_step); }
void fgsm_step(const Call& call, void*) { run(call, call.has_noise ? start_and_step : take_step); }

void philox_words(int64_t n, const int64_t* seed, const int64_t* index, const int64_t* restart, uint32_t word3,
                  int64_t* words, void*) {
  for (int64_t i = 0; i < n; ++i) {
    const Words w = philox(static_cast<uint64_t>(seed[i]), static_cast<uint64_t>(index[i]),
                           static_cast<uint32_t>(restart[i]), word3);
    std::copy_n(w.v, 4, words + 4 * i);
  }
}

}  // namespace fastadv
