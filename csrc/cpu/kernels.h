// The inner loops over one tile, compiled once per instruction set and chosen when the library loads.
#pragma once

#include <cstdint>

namespace fastadv {

constexpr int kTile = 512;  // elements; a tile's few arrays stay in the L1 cache (measured: see benchmarks/NOTES.md)

// What the next loops will read. The loop that makes random bits computes and leaves the memory idle, so it fetches a
// stretch of each stream for every group of eight elements that it makes bits for:
//
//     random bits   | group 0      | group 1      | group 2      |      (computed)
//     stream 0      | 32 bytes     | 32 bytes     | 32 bytes     |      (fetched meanwhile; 8 floats are 32 bytes)
struct Ahead {
  const char* streams[2] = {};  // null: none
  int64_t bytes_per_group[2] = {};
};

// The tables are indexed by types, in the order of DType.
struct Kernels {
  const char* name;
  // dst[i] = src[i * stride] as the compute type [float64, float32], from each DType; grads keep their sign.
  void (*load[2][5])(const void* src, int64_t stride, int64_t n, void* dst);
  void (*load_grad[2][4])(const void* src, int64_t stride, int64_t n, void* dst);
  // Writes 16 random bits for each element of `groups` groups from group `first` on: two 64-bit words a group of eight.
  // It writes a multiple of 32 groups, at most those of kTile, and fetches `ahead` meanwhile.
  void (*random_bits)(uint64_t key, uint64_t first, int64_t groups, uint64_t* words, Ahead ahead);
  // [compute type][result type][whether parameters are arrays; else each points to one value]. All arguments but `out`
  // are of the compute type.
  void (*start[2][4][2])(int64_t n, const void* x, const uint16_t* bits, const void* noise, const void* lo,
                         const void* hi, void* out);
  // ... [project]
  void (*step[2][4][2][2])(int64_t n, const void* x0, const void* grad, const void* x, const void* alpha,
                           const void* eps, const void* lo, const void* hi, void* out);
  void (*round_inward[2][4])(int64_t n, void* lo, void* hi);
  // [compute type][z's type][whether mean and scale are arrays]: they and w are of the compute type.
  void (*normalize[2][4][2])(int64_t n, const void* w, const void* mean, const void* scale, void* z);
};

#if defined(__x86_64__)
extern const Kernels kernels_v4, kernels_v3;
#endif
extern const Kernels kernels_base;

}  // namespace fastadv
