// The instruction set in use: the best the machine has, until use_isa() chooses another.
#pragma once

#include "kernels.h"

namespace fastadv {

const Kernels& isa();

}  // namespace fastadv
