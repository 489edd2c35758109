// What a kernel sees of its tensors: an order of all elements, which positions and noise follow, and the strides of
// every operand in this order. Shared by the CPU and the CUDA library; nothing here knows PyTorch.
//
// An example: x of shape (2, 3, 4, 4) in channels-last layout, its gradient contiguous.
//
//     dimension         N    H    W    C         the order is x's own, so C is innermost
//     size              2    4    4    3
//     stride of x      48   12    3    1         for x alone the four dimensions would merge into one of 96 elements
//     stride of grad   48    4    1   16         H and W merge into one of 16, for both operands: 3 dimensions are left
#pragma once

#include <cstdint>

namespace fastadv {

constexpr int kMaxDims = 64;  // PyTorch's own limit for elementwise operations

enum class DType : int { kFloat64, kFloat32, kFloat16, kBFloat16, kUInt8 };

constexpr int64_t size_of(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : t == DType::kUInt8 ? 1 : 2;
}

// A tensor as PyTorch has it. All tensors of a call have the same sizes; a parameter may have size 1 in any dimension.
struct Strided {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;  // in elements
  int dims = 0;                      // 0 for a parameter that is one number
};

inline bool same(const Strided& a, const Strided& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.dims != b.dims) return false;
  for (int d = 0; d < a.dims; ++d)
    if (a.strides[d] != b.strides[d] || a.sizes[d] != b.sizes[d]) return false;
  return true;
}

inline bool reaches_apart(const Strided& a, const Strided& b) {
  auto end = [](const Strided& t) {
    int64_t last = 0;
    for (int d = 0; d < t.dims; ++d) last += (t.sizes[d] - 1) * t.strides[d];
    return t.data + (last + 1) * size_of(t.dtype);
  };
  return end(a) <= b.data || end(b) <= a.data;
}

// Sorts the dimensions by their strides, the smallest first, without those of size 1. Writes their numbers to `order`
// and returns how many there are.
inline int by_stride(const Strided& t, int first_dim, int* order) {
  int count = 0;
  for (int d = t.dims - 1; d >= first_dim; --d) {
    if (t.sizes[d] == 1) continue;
    int at = count++;
    for (; at > 0 && t.strides[order[at - 1]] > t.strides[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  return count;
}

// Whether two elements may lie at one address. Sizes and strides decide, from the innermost dimension out: true where a
// stride is shorter than what the dimensions inside it take up, even if no two elements meet.
inline bool overlaps_itself(const Strided& t) {
  int order[kMaxDims];
  const int count = by_stride(t, 0, order);
  int64_t extent = 1;
  for (int i = 0; i < count; ++i) {
    if (t.strides[order[i]] < extent) return true;
    extent += t.strides[order[i]] * (t.sizes[order[i]] - 1);
  }
  return false;
}

// A tensor in the order of a layout: outermost dimension first, two neighbouring dimensions as one where every operand
// allows it.
struct Operand {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t block_stride = 0;
  int64_t strides[kMaxDims];  // the first `dims` of the layout's
};

// The order of all elements. With per-sample seeds each sample is a block, whose noise is drawn as for a tensor of its
// own; else there is one block.
template <int kOperands>
struct Layout {
  int64_t blocks = 1, block_size = 1;
  int dims = 0;
  int64_t sizes[kMaxDims];
  Operand operands[kOperands];

  bool flat() const { return dims <= 1; }
};

// Dimensions of torch.empty_like(x), innermost first: writes their numbers to `order`, returns how many.
inline int memory_order(const Strided& x, int first_dim, int* order) {
  // A dense tensor keeps its strides.
  int count = by_stride(x, first_dim, order);
  int64_t elements = 1;
  bool dense = true;
  for (int i = 0; i < count; ++i) {
    dense = dense && x.strides[order[i]] == elements;
    elements *= x.sizes[order[i]];
  }
  if (dense) return count;
  // Any other gets dense strides in the order of its own, where a stride of 0 says nothing and a tie puts the smaller
  // size inside: an insertion sort from the last dimension on, which skips what says nothing.
  count = x.dims - first_dim;
  for (int i = 0; i < count; ++i) order[i] = x.dims - 1 - i;
  auto outside = [&](int a, int b) {  // 1: a belongs outside of b, -1: inside, 0: unknown
    const int64_t sa = x.strides[a], sb = x.strides[b];
    if (sa == 0 || sb == 0) return 0;
    if (sa != sb) return sa < sb ? -1 : 1;
    return x.sizes[a] > x.sizes[b] ? 1 : 0;
  };
  for (int i = 1; i < count; ++i) {
    int moving = i;
    for (int j = i - 1; j >= 0; --j) {
      const int side = outside(order[j], order[moving]);
      if (side < 0) break;
      if (side > 0) {
        const int other = order[j];
        order[j] = order[moving];
        order[moving] = other;
        moving = j;
      }
    }
  }
  return count;
}

// How many elements follow each other, in x's order, with the same index in dimension `dim` (of a size other than 1).
inline int64_t run_length(const Strided& x, int first_dim, int dim) {
  int order[kMaxDims];
  const int count = memory_order(x, first_dim, order);
  int64_t length = 1;
  for (int i = 0; i < count && order[i] != dim; ++i) length *= x.sizes[order[i]];
  return length;
}

// Writes how the tensors lie in x's order into a new `layout` (its kilobytes are not to be copied). Null data marks an
// operand that is not there. Precondition: x's shape fits every operand.
template <int kOperands>
void make_layout(const Strided& x, const Strided (&tensors)[kOperands], bool per_sample, Layout<kOperands>& layout) {
  const int first_dim = per_sample ? 1 : 0;
  int order[kMaxDims];
  const int count = memory_order(x, first_dim, order);
  auto stride = [](const Strided& t, int d) -> int64_t { return t.dims == 0 || t.sizes[d] == 1 ? 0 : t.strides[d]; };

  for (int k = 0; k < kOperands; ++k) {
    layout.operands[k].data = tensors[k].data;
    layout.operands[k].dtype = tensors[k].dtype;
    if (per_sample && tensors[k].data) layout.operands[k].block_stride = stride(tensors[k], 0);
  }
  if (per_sample) layout.blocks = x.sizes[0];
  for (int i = count - 1; i >= 0; --i) {  // outermost first
    const int d = order[i];
    const int64_t size = x.sizes[d];
    layout.block_size *= size;
    if (size == 1) continue;
    bool merge = layout.dims > 0;
    for (int k = 0; k < kOperands && merge; ++k)
      merge = !tensors[k].data || layout.operands[k].strides[layout.dims - 1] == stride(tensors[k], d) * size;
    if (!merge) ++layout.dims;
    layout.sizes[layout.dims - 1] = merge ? layout.sizes[layout.dims - 1] * size : size;
    for (int k = 0; k < kOperands; ++k)
      if (tensors[k].data) layout.operands[k].strides[layout.dims - 1] = stride(tensors[k], d);
  }
}

}  // namespace fastadv
