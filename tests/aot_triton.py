"""Compiles, with no GPU, exactly what the Triton launchers would compile for one, and prints what came out as JSON.

Run by test_triton_aot.py in a process of its own: the test process has Triton's interpreter switched on. The real
launchers run, on CPU tensors; a stand-in for the driver names the target, and a launch stops after compilation.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.jit import JITFunction

from fastadv.ops import triton_kernels


class NoDevice(CudaDriver):
    """As much of a driver as compiling takes."""

    def __init__(self, capability):
        self.capability = capability
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_device_capability(self, device=0):
        return divmod(self.capability, 10)


compiled = []
_run = JITFunction.run


def _compile_only(self, *args, grid, warmup, **kwargs):
    compiled.append((self.fn.__name__, _run(self, *args, grid=grid, warmup=True, **kwargs)))


def resources(ptx, capability):
    """(registers, bytes spilled) as ptxas counts them."""
    arch = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"-arch={arch}", "--fmad=false", source, "-o", cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
    return int(re.search(r"Used (\d+) registers", text).group(1)), spilled


def facts(case, capability):
    name, kernel = compiled.pop()
    assert not compiled, "a call launches one kernel"
    ptx = kernel.asm["ptx"]
    registers, spilled = resources(ptx, capability)
    accesses = re.findall(r"\b(?:ld|st)\.global\S*", ptx)
    wide = [a for a in accesses if re.search(r"\.v4\.b32|\.v2\.b64|\.v2\.u64|\.v4\.u32", a)]
    return {
        "case": case, "arch": f"sm_{capability}", "kernel": name, "registers": registers, "spilled_bytes": spilled,
        "accesses": len(accesses), "wide_accesses": len(wide), "narrow": sorted(set(accesses) - set(wide)),
        "fused": len(re.findall(r"\bfma\.", ptx)),
    }  # fmt: skip


def cases(size=1 << 16):
    """(name, op, its tensors and keywords): the types training makes; sizes and addresses as torch gives them."""
    f32, f16, bf16, u8 = torch.float32, torch.float16, torch.bfloat16, torch.uint8
    for x_type, grad_type in [(f32, f32), (f32, bf16), (f32, f16), (f16, f16), (bf16, bf16), (u8, f32), (u8, bf16)]:
        x = torch.zeros(16, 4, size // 64, dtype=x_type)
        out = torch.zeros_like(x, dtype=f32 if x_type == u8 else x_type)
        grad = torch.zeros_like(x, dtype=grad_type)
        box, eps = (0.0, 1.0), 8 / 255
        name = f"{str(x_type)[6:]} grad {str(grad_type)[6:]}"
        pgd = (out, out.clone(), grad, x, 2 / 255, eps, *box)
        yield f"pgd_step {name}", "pgd_step", pgd
        yield f"fgsm_step {name}", "fgsm_step", (out, x, grad, True, eps, eps, 0.0, 0, *box)
        rs = (out, x, grad, True, 10 / 255, eps, eps, 7, *box)
        yield f"fgsm_step with noise {name}", "fgsm_step", rs
        if grad_type in (x_type, f32):
            yield f"random_init {str(x_type)[6:]}", "random_init", (out, x, eps, 7, *box)
        mean = torch.zeros(1, 4, 1)
        for z_type in (f32, bf16):
            z = (torch.zeros_like(out, dtype=z_type), mean, mean)
            yield f"pgd_step {name} z {str(z_type)[6:]}", "pgd_step_z", (out, *z, *pgd[1:])
            yield f"fgsm_step with noise {name} z {str(z_type)[6:]}", "fgsm_step_z", (out, *z, *rs[1:])


def main(capabilities):
    JITFunction.run = _compile_only
    results = []
    for capability in capabilities:
        triton.runtime.driver.set_active(NoDevice(capability))
        for name, op, args in cases():
            triton_kernels.IMPLEMENTATIONS[op](*args)
            results.append(facts(name, capability))
        # What lies otherwise goes through the other kernel.
        x = torch.zeros(4, 3, 8, 8)
        eps = torch.zeros(4, 1, 1, 1)
        seeds = torch.zeros(4, dtype=torch.int64)
        image, out = x[..., ::2], x[..., 1::2].clone()
        numbers, tensors = (0.1, 0.0, 0.0, 0), (None, eps, eps, seeds)
        args = (image, image, True, *numbers, 0.0, 1.0, *tensors, None, None)
        triton_kernels.fgsm_step(out, *args)
        results.append(facts("fgsm_step with noise, any layout", capability))
        mean = torch.zeros(1, 3, 1, 1)
        triton_kernels.IMPLEMENTATIONS["fgsm_step_z"](out, out.clone(), mean, mean, *args)
        results.append(facts("fgsm_step with noise, any layout z", capability))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main([int(c) for c in sys.argv[1:]])
