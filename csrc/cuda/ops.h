// What the CUDA kernels cost on the current device.
#pragma once

#include <string>
#include <vector>

namespace fastadv {

struct Attributes {
  std::string name;
  int registers, local_bytes, shared_bytes;  // local memory a thread: spills and arrays
  double occupancy;                          // resident threads over the most an SM holds
};

std::vector<Attributes> kernel_attributes();

}  // namespace fastadv
