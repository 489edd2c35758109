"""The cases of the benchmarks: ops, sizes and dtypes, and the contenders of each case."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastadv

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS, ALPHA, SEED = 8 / 255, 2 / 255, 1234
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "u8": torch.uint8}
PAIRS = ("f32/f32", "f32/bf16", "bf16/bf16", "f16/f16", "u8/f32")  # image/grad

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

SIZES = {
    "16": (16,),  # only for the host's time
    "tiny": (2, 3, 8, 8),  # to try the benchmark itself; its times mean nothing
    "cifar": (128, 3, 32, 32),
    "imagenet": (64, 3, 224, 224),
    "large": (192, 3, 224, 224),  # 115 MB in float32: beyond any cache
    "huge": (1024, 3, 224, 224),  # 2.5 GB of float32 tensors for pgd_step
}
USUAL_SIZES = "cifar,large,huge" if DEVICE.type == "cuda" else "cifar,imagenet,large"
CHOSEN_SIZES = os.environ.get("FASTADV_BENCH_SIZES", USUAL_SIZES).split(",")


# ------------------------------------------------------------------ the naive steps, as written by hand


def pixels(x):
    return x / 255 if x.dtype == torch.uint8 else x


def naive_start(x):
    x = pixels(x)
    return torch.clamp(x + torch.empty_like(x).uniform_(-EPS, EPS), 0, 1)


def naive_pgd(x_adv, grad, x):
    x = pixels(x)
    x_adv = x_adv + ALPHA * grad.sign()
    return torch.clamp(x + torch.clamp(x_adv - x, -EPS, EPS), 0, 1)


def naive_fgsm(x, grad):
    return torch.clamp(pixels(x) + EPS * grad.sign(), 0, 1)


def naive_fgsm_rs(x, grad):
    return naive_pgd(naive_start(x), grad, x)


def with_model_input(naive, dtype):
    """The naive step, then the normalisation inside a model as a separate operation on its result."""
    mean, std = (torch.tensor(v, dtype=dtype, device=DEVICE).view(1, -1, 1, 1) for v in (MEAN, STD))

    def run(*inputs):
        w = naive(*inputs)
        return w, (w - mean) / std

    return run


# ------------------------------------------------------------------ the op table


@dataclass(frozen=True)
class Op:
    reads: tuple  # the tensors that both callables take, in their order
    fused: Callable
    naive: Callable


OPS = {
    "pgd_step": Op(("x_adv", "grad", "x"), functools.partial(fastadv.pgd_step, alpha=ALPHA, eps=EPS), naive_pgd),
    "fgsm_step": Op(("x", "grad"), functools.partial(fastadv.fgsm_step, eps=EPS), naive_fgsm),
    "fgsm_rs_step": Op(
        ("x", "grad"),
        functools.partial(fastadv.fgsm_step, eps=EPS, alpha=ALPHA, noise=EPS, seed=SEED),
        naive_fgsm_rs,
    ),
    "random_init": Op(("x",), functools.partial(fastadv.random_init, noise=EPS, seed=SEED), naive_start),
}


NORMALIZATION = fastadv.Normalization(MEAN, STD)


@dataclass(frozen=True)
class Case:
    op: str
    size: str
    pair: str
    backend: str
    layout: str = "contiguous"
    z: bool = False  # whether the step also writes the model's next input

    @property
    def name(self):
        """The name of the op, with the layout and z where they are not the usual ones."""
        return self.op + " z" * self.z + " channels-last" * (self.layout == "channels_last")

    @property
    def id(self):
        return f"{self.name.replace(' ', '_')}-{self.size}-{self.pair}-{self.backend}"

    def laid_out(self, t):
        return t.contiguous(memory_format=LAYOUTS[self.layout])

    def dtypes(self):
        """The dtype of each tensor and of the result; for uint8 images the result is float32."""
        image, grad = (DTYPES[name] for name in self.pair.split("/"))
        result = torch.float32 if image == torch.uint8 else image
        return {"x": image, "grad": grad, "x_adv": result, "out": result}

    def inputs(self):
        """New random tensors; some gradients are zero, as in a ReLU network."""
        shape, dtypes = SIZES[self.size], self.dtypes()
        x = torch.rand(shape, device=DEVICE)
        made = {
            "x": (x * 255).to(torch.uint8) if dtypes["x"] == torch.uint8 else x.to(dtypes["x"]),
            "x_adv": (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp_(0, 1).to(dtypes["x_adv"]),
            "grad": (torch.randn(shape, device=DEVICE) * (torch.rand(shape, device=DEVICE) > 0.1)).to(dtypes["grad"]),
        }
        return [self.laid_out(made[name]) for name in OPS[self.op].reads]

    def output(self):
        """The tensor for the result, filled with NaN: a number that a kernel does not write is then seen."""
        return self.laid_out(torch.full(SIZES[self.size], torch.nan, dtype=self.dtypes()["out"], device=DEVICE))

    def model_input(self, out):
        """The arguments with which the step writes z."""
        return {"normalization": NORMALIZATION, "z": torch.full_like(out, torch.nan)} if self.z else {}

    def bytes(self, inputs, out):
        return sum(t.nbytes for t in (*inputs, out)) + self.z * out.nbytes


def backends(size):
    """The native backend; on a GPU also Triton; on a CPU also the reference, at sizes where it is not too slow."""
    if DEVICE.type == "cuda":
        return ("cuda", "triton")
    return ("cpu", "reference") if size in ("tiny", "cifar") else ("cpu",)


def pairs(op, size):
    found = PAIRS if DEVICE.type == "cuda" or size != "large" else PAIRS[:1]
    # random_init reads no gradient.
    return found if "grad" in OPS[op].reads else [p for p in found if p != "f32/bf16"]


def special(op, pair, size):
    """(layout, z) of the cases at a size: on a GPU one size also has the other layout, and the model's input."""
    if DEVICE.type == "cuda" and size == "large" and pair in ("f32/f32", "bf16/bf16"):
        return [("contiguous", False), ("channels_last", False), ("contiguous", True), ("channels_last", True)]
    return [("contiguous", False)]


def all_cases():
    """All cases. The backends of a case follow each other, because they share its compiled contender."""
    return [
        Case(op, size, pair, backend, layout, z)
        for op in OPS
        for pair in pairs(op, "cifar")
        for size in CHOSEN_SIZES
        if pair in pairs(op, size)
        for layout, z in special(op, pair, size)
        for backend in backends(size)
    ]


# ------------------------------------------------------------------ the contenders


def naive_step(op, pair, z):
    if not z:
        return OPS[op].naive
    image = DTYPES[pair.split("/")[0]]
    return with_model_input(OPS[op].naive, torch.float32 if image == torch.uint8 else image)


@functools.lru_cache(maxsize=1)
def compiled(op, shape, pair, z):
    """The naive step under torch.compile: for a fixed `shape`, or for all shapes where it is None."""
    torch._dynamo.reset()
    return torch.compile(naive_step(op, pair, z), fullgraph=True, dynamic=shape is None)


# Names of contenders, separated by commas; none means all. Compiling the compiled step takes longer than timing it.
CHOSEN_CONTENDERS = [name for name in os.environ.get("FASTADV_BENCH_CONTENDERS", "").split(",") if name]


def contenders(case, quick):
    """{name: a function that takes (inputs, out) and returns the call to time}.

    A quick run, which measures nothing, compiles once for all sizes: to compile takes most of its time.
    """
    fused, naive = OPS[case.op].fused, naive_step(case.op, case.pair, case.z)
    shape = None if quick else SIZES[case.size]
    made = {
        "fastadv": lambda inputs, out: functools.partial(fused, *inputs, out=out, **case.model_input(out)),
        "naive": lambda inputs, out: functools.partial(naive, *inputs),
        "compile": lambda inputs, out: functools.partial(compiled(case.op, shape, case.pair, case.z), *inputs),
        "copy": lambda inputs, out: functools.partial(out.copy_, torch.rand_like(out)),
    }
    if DEVICE.type == "cuda":  # a kernel that does nothing shows the least time of a small case
        made["empty"] = lambda inputs, out: functools.partial(torch.cuda._sleep, 0)
    return {name: make for name, make in made.items() if not CHOSEN_CONTENDERS or name in CHOSEN_CONTENDERS}
