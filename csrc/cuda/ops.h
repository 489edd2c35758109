// What the library asks of CUDA beside its kernels.
#pragma once

#include <string>
#include <vector>

namespace fastadv {

int current_device();

// What a kernel costs there.
struct Attributes {
  std::string name;
  int registers, local_bytes, shared_bytes;  // local memory a thread: spills and arrays
  double occupancy;                          // resident threads over the most an SM holds
};

std::vector<Attributes> kernel_attributes();

}  // namespace fastadv
