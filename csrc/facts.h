// What the extension modules tell of themselves: `facts()` and what else a device has to say.
#pragma once

#include <pybind11/pybind11.h>

namespace fastadv {

void add_facts(pybind11::module_& module);

}  // namespace fastadv
