#include "isa.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "../facts.h"
#include <pybind11/stl.h>

namespace fastadv {
namespace {

// Best first. A level is asked for by the features that the compiler's -march=x86-64-vN may use.
std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("fma");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) found.push_back(&kernels_v4);
  if (v3) found.push_back(&kernels_v3);
#endif
  found.push_back(&kernels_base);
  return found;
}

std::atomic<const Kernels*> chosen{usable().front()};

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const Kernels* k : usable()) all.emplace_back(k->name);
  return all;
}

void use_isa(const std::string& name) {
  for (const Kernels* k : usable())
    if (name == k->name) {
      chosen = k;
      return;
    }
  throw std::invalid_argument("no instruction set " + name + " here: see facts()['instruction_sets']");
}

pybind11::dict facts() {
  pybind11::dict d;
  d["compiler"] = FASTADV_COMPILER;
  d["flags"] = FASTADV_FLAGS;
  d["instruction_set"] = isa().name;
  d["instruction_sets"] = names();
  return d;
}

}  // namespace

const Kernels& isa() { return *chosen.load(std::memory_order_relaxed); }

void add_facts(pybind11::module_& module) {
  module.def("facts", facts, "Compiler, flags, and the instruction sets this machine can run, best first.");
  module.def("use_isa", use_isa, "Run the kernels of another instruction set: all give the same bits.");
}

}  // namespace fastadv
