// What host and device compilers call the same things.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTADV_HD __host__ __device__ __forceinline__
#else
#define FASTADV_HD inline __attribute__((always_inline))
#endif
#if defined(__CUDACC__)
#define FASTADV_UNROLL _Pragma("unroll")
#elif defined(__clang__)
#define FASTADV_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FASTADV_UNROLL _Pragma("GCC unroll 16")
#endif
