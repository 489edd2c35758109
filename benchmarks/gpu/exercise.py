"""Compares every kernel with the reference, on small tensors: all ops, dtypes, layouts, kinds of parameters, and z.

It runs alone, or under compute-sanitizer, which watches the memory accesses. Arguments name the backends; by default
all of them run. With `--seconds` it ends after that time, and shuffles the calls, always into the same order. Without a
GPU it runs the CPU kernels, and Triton's in its interpreter (TRITON_INTERPRET=1), with fewer dtypes.
"""

import argparse
import itertools
import random
import sys
import time

import torch

import fastadv

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ("cuda", "triton") if GPU else ("cpu", "triton")
SHAPE = (3, 3, 17, 19) if GPU else (2, 3, 5, 7)  # several blocks and a tail
EPS = 8 / 255
NORMALIZATION = fastadv.Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))

f64, f32, f16, bf16, u8 = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8
PAIRS = [(f32, f32), (u8, bf16), (bf16, bf16), (f32, bf16), (f32, f16), (f16, f16), (u8, f32), (f64, f64), (f64, f32)]
LAYOUTS = ("contiguous", "channels_last", "misaligned", "sliced", "expanded")

# {op: (the tensors that it takes, the parameter under test, the other arguments)}
OPS = {
    "random_init": (("x",), "noise", {"seed": 7}),
    "fgsm_step": (("x", "grad"), "eps", {}),
    "fgsm_step with noise": (("x", "grad"), "eps", {"noise": 2 * EPS, "seed": 7}),
    "fgsm_step unprojected": (("x", "grad"), "eps", {"noise": 2 * EPS, "seed": 7, "project": False}),
    "pgd_step": (("x_adv", "grad", "x"), "eps", {"alpha": EPS / 4}),
}


def laid_out(values, layout, device):
    """The values in a layout, on a device. Gaps in the storage are filled, so that nothing uninitialised is read."""
    n, c, h, w = values.shape
    if layout == "expanded":
        return values[:1].to(device).expand(values.shape)
    if layout == "channels_last":
        return values.to(device).contiguous(memory_format=torch.channels_last)
    if layout == "misaligned":
        view = torch.zeros(values.numel() + 1, dtype=values.dtype, device=device)[1:].view(values.shape)
    elif layout == "sliced":
        view = torch.zeros(n, c, h, 2 * w, dtype=values.dtype, device=device)[..., ::2]
    else:
        view = torch.zeros(values.shape, dtype=values.dtype, device=device)
    return view.copy_(values)


def values_of(image, grad):
    x = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    pixels = x.double() / 255
    result = f32 if image == u8 else image
    gradient = torch.randn(SHAPE)
    gradient.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), 0.0, 1e-40])
    return {
        "x": x if image == u8 else pixels.to(image),
        "x_adv": (pixels + torch.empty(SHAPE).uniform_(-EPS, EPS)).clamp(0, 1).to(result),
        "grad": gradient.to(grad),
    }


def call(op, values, layout, parameter, with_z, device):
    """What one call writes into `out` and, if `with_z`, into z of the gradient's dtype. Both begin filled with NaN."""
    names, tested, fixed = OPS[op]
    tensors = {name: laid_out(values[name], layout, device) for name in names}
    like = tensors.get("x_adv", tensors["x"])
    poison = torch.full(SHAPE, torch.nan, dtype=f32 if like.dtype == u8 else like.dtype)
    layout = "contiguous" if layout == "expanded" else layout
    out, z = laid_out(poison, layout, device), laid_out(poison.to(values["grad"].dtype), layout, device)
    if parameter == "per sample":
        fixed = {**fixed, tested: torch.linspace(EPS / 2, EPS, SHAPE[0]).view(-1, 1, 1, 1).to(device)}
        if "seed" in fixed:
            fixed["seed"] = torch.arange(SHAPE[0], device=device)
    else:
        fixed = {**fixed, tested: EPS}
    more = {"normalization": NORMALIZATION, "z": z} if with_z else {}
    getattr(fastadv, op.split()[0])(**tensors, **fixed, **more, out=out)
    return [t.cpu() for t in ((out, z) if with_z else (out,))]


def cases():
    for op, (image, grad) in itertools.product(OPS, PAIRS if GPU else PAIRS[:2]):
        # random_init takes no gradient: one pair for each image dtype is enough.
        if op != "random_init" or (image, grad) == next(p for p in PAIRS if p[0] == image):
            for layout, kind, with_z in itertools.product(LAYOUTS, ("number", "per sample"), (False, True)):
                yield op, image, grad, layout, kind, with_z


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("backends", nargs="*", help=f"of {', '.join(BACKENDS)} (all)")
    parser.add_argument("--seconds", type=float, help="end after this many seconds")
    args = parser.parse_args(argv)
    chosen, end = list(cases()), time.monotonic() + (args.seconds or float("inf"))
    if args.seconds:
        random.Random(0).shuffle(chosen)
    done, mismatches = 0, []
    for op, image, grad, layout, parameter, with_z in chosen:
        if time.monotonic() > end:
            break
        values = values_of(image, grad)
        with fastadv.backend("reference"):
            want = call(op, values, layout, parameter, with_z, "cpu")
        for backend in args.backends or BACKENDS:
            with fastadv.backend(backend):
                got = call(op, values, layout, parameter, with_z, DEVICE)
            done += 1
            if not all(map(torch.equal, got, want)):
                mismatches.append(f"{backend}: {op}, {image}, {grad}, {layout}, {parameter}, z {with_z}")
    print(*mismatches, sep="\n")
    print(f"{done} calls, {len(mismatches)} mismatches")
    return bool(mismatches)


if __name__ == "__main__":
    sys.exit(main())
