"""Compiles without a GPU exactly the kernels that the Triton launchers would compile on one.

    python benchmarks/gpu/triton_aot.py 75     # every kernel for sm_75, one line for each

The real launchers run on CPU tensors. A stand-in for the driver names the target, and a launch stops after compilation.
This does not work under Triton's interpreter.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.jit import JITFunction

from fastadv.ops import triton_kernels

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "u8": torch.uint8}
TRAINING = ("f32/f32", "f32/bf16", "f32/f16", "f16/f16", "bf16/bf16", "u8/f32", "u8/bf16")  # images/gradients


class NoDevice(CudaDriver):
    """A driver with only what compilation needs."""

    def __init__(self, capability):
        self.capability = capability
        self.get_current_device = lambda: capability  # one number per target: Triton keeps kernels by it
        self.get_current_stream = lambda device: 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_device_capability(self, device=0):
        return divmod(self.capability, 10)


def launches(size=1 << 16):
    """Yield ((op, layout, types of images, gradients and z), name of the op, its arguments) for every kernel.

    Sizes and addresses, for which Triton specialises its kernels, are those of usual tensors.
    """
    box, eps, mean = (0.0, 1.0), 8 / 255, torch.zeros(1, 4, 1)
    for x_type, grad_type in (pair.split("/") for pair in TRAINING):
        x = torch.zeros(16, 4, size // 64, dtype=TYPES[x_type])
        out = torch.zeros_like(x, dtype=torch.float32 if x_type == "u8" else x.dtype)
        grad = torch.zeros_like(x, dtype=TYPES[grad_type])
        calls = {
            "pgd_step": ("pgd_step", (out.clone(), grad, x, 2 / 255, eps, *box)),
            "fgsm_step": ("fgsm_step", (x, grad, True, eps, eps, 0.0, 0, *box)),
            "fgsm_step noise": ("fgsm_step", (x, grad, True, 10 / 255, eps, eps, 7, *box)),
        }
        for name, (op, args) in calls.items():
            yield (name, "flat", x_type, grad_type, ""), op, (out, *args)
            for z_type in ("f32", "bf16") if name != "fgsm_step" else ():
                z = torch.zeros_like(out, dtype=TYPES[z_type])
                yield (name, "flat", x_type, grad_type, z_type), f"{op}_z", (out, z, mean, mean, *args)
        if grad_type in (x_type, "f32"):
            yield ("random_init", "flat", x_type, "", ""), "random_init", (out, x, eps, 7, *box)
    # Tensors with gaps go through the other kernel: here every second column, with an eps and a seed for each image.
    x, eps, seeds = torch.zeros(4, 3, 8, 8), torch.zeros(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64)
    image, out, mean = x[..., ::2], x[..., 1::2].clone(), torch.zeros(1, 3, 1, 1)
    args = (image, image, True, 0.1, 0.0, 0.0, 0, *box, None, eps, eps, seeds, None, None)
    yield ("fgsm_step noise", "any", "f32", "f32", ""), "fgsm_step", (out, *args)
    yield ("fgsm_step noise", "any", "f32", "f32", "f32"), "fgsm_step_z", (out, out.clone(), mean, mean, *args)


def compiled(capability, wanted):
    """Yield (facts, compiled kernel) for every launch with wanted facts, for sm_<capability>."""
    kernels, run = [], JITFunction.run
    triton.runtime.driver.set_active(NoDevice(capability))
    JITFunction.run = lambda *args, warmup, **options: kernels.append(run(*args, warmup=True, **options))
    try:
        for facts, op, args in launches():
            if wanted(facts):
                triton_kernels.IMPLEMENTATIONS[op](*args)
                (kernel,) = kernels  # a call launches one kernel
                kernels.clear()
                assert kernel.metadata.target.arch == capability
                yield facts, kernel
    finally:
        JITFunction.run = run


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for facts, _ in compiled(capability, lambda facts: True):
            print(f"sm_{capability}", *filter(None, facts), flush=True)
