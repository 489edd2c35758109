// The inner loops over one tile, compiled once per instruction set and chosen when the library loads.
#pragma once

#include <cstdint>

namespace fastadv {

constexpr int kTile = 512;  // elements; a tile's few arrays stay in the L1 cache (measured: see benchmarks/NOTES.md)

struct Ahead {
  const char* streams[2] = {};  // null: none
  int64_t bytes_per_group[2] = {};
};

// Index of a compute type or of a result type in the tables: DType's own order.
struct Kernels {
  const char* name;
  // dst[i] = src[i * stride] as the compute type [float64, float32], from each DType; grads keep their sign.
  void (*load[2][5])(const void* src, int64_t stride, int64_t n, void* dst);
  void (*load_grad[2][4])(const void* src, int64_t stride, int64_t n, void* dst);
  // The 16 random bits of the 8 * groups elements from group `first` on: two 64-bit words a group. Writes a multiple of
  // 32 groups, kTile's at most. Meanwhile memory would idle, so what the next loops read is fetched: `ahead`, of so
  // many bytes a group.
  void (*random_bits)(uint64_t key, uint64_t first, int64_t groups, uint64_t* words, Ahead ahead);
  // [compute type][result type][whether each parameter is an array, else the one value it points to]; all but `out` are
  // of the compute type.
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
