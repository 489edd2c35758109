// As much of CUDA as the kernels and their launcher use, on the CPU: threads run one after the other, which is right
// for kernels that share nothing. For tests only: it shows that indices, packs and dispatch are right, not that the
// machine's own instructions are.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y), z(1) {}
};
inline dim3 blockIdx, threadIdx, gridDim;

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

enum { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// What the kernels' code was made of, on the device that is asked: FASTADV_EMULATED_PTX has a version for each device,
// FASTADV_EMULATED_DEVICE the current one's index, and FASTADV_EMULATED_ERROR what a launch returns. Left there are
// whether the last launch had attributes, FASTADV_EMULATED_ATTRIBUTES, and FASTADV_EMULATED_LAST, whether an error was
// not read.
inline int from_environment(const char* name, int place = 0) {
  const char* text = std::getenv(name);
  for (; text && place > 0; --place) text = std::strchr(text, ',') ? std::strchr(text, ',') + 1 : nullptr;
  return text ? std::atoi(text) : 0;
}
inline cudaError_t cudaGetLastError() {
  setenv("FASTADV_EMULATED_LAST", "0", 1);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  return *device = from_environment("FASTADV_EMULATED_DEVICE"), cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  setenv("FASTADV_EMULATED_ATTRIBUTES", config->numAttrs ? "1" : "0", 1);
  if (const int error = from_environment("FASTADV_EMULATED_ERROR")) {
    setenv("FASTADV_EMULATED_LAST", "1", 1);
    return error;
  }
  gridDim = config->gridDim;
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < config->blockDim.x; ++threadIdx.x) kernel(arguments...);
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int numRegs = 0, ptxVersion = 0;
  size_t localSizeBytes = 0, sharedSizeBytes = 0;
};
enum { cudaDevAttrMaxThreadsPerMultiProcessor };
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  int device = 0;
  cudaGetDevice(&device);
  return a->ptxVersion = from_environment("FASTADV_EMULATED_PTX", device), cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 1, cudaSuccess; }
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int*, const void*, int, size_t) { return cudaSuccess; }
