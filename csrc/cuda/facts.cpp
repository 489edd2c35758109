#include <pybind11/pybind11.h>

#include "../facts.h"
#include "ops.h"

namespace fastadv {

void add_facts(pybind11::module_& module) {
  namespace py = pybind11;
  module.def(
      "facts",
      [] {
        py::dict d;
        d["nvcc"] = FASTADV_NVCC;
        d["archs"] = FASTADV_ARCHS;
        return d;
      },
      "The CUDA release and the architectures the kernels were built for.");
  module.def(
      "kernels",
      [] {
        py::list all;
        for (const Attributes& a : kernel_attributes())
          all.append(py::dict(py::arg("name") = a.name, py::arg("registers") = a.registers,
                              py::arg("local_bytes") = a.local_bytes, py::arg("shared_bytes") = a.shared_bytes,
                              py::arg("occupancy") = a.occupancy));
        return all;
      },
      "Registers, local memory (spills), shared memory and occupancy of every kernel, on the current device.");
}

}  // namespace fastadv
