"""hypothesis strategies for whole calls of an op: dtypes, layouts, sizes, values, parameters and seeds.

hypothesis draws the choices and one integer, which is the seed of NumPy's numbers. So an example is cheap and its
description short: the `Case(...)` of a failure has everything that is needed to build it again.
"""

import functools
from dataclasses import dataclass, field, replace

import numpy as np
import oracle
import torch
from hypothesis import strategies as st

import fastadv

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OPS = ("random_init", "fgsm_step", "pgd_step")

# Sizes 0, 1, 3, 7, other odd sizes, whole vectors, and enough elements for vector bodies, tails and several tiles.
SHAPES = [
    (),
    (0,),
    (1,),
    (3,),
    (7,),
    (8,),
    (17,),
    (255,),
    (1024,),
    (5003,),
    (1, 1),
    (3, 0),
    (2, 7),
    (7, 9),
    (16, 64),
    (67, 65),
    (2, 0, 3),
    (3, 5, 7),
    (4, 3, 33),
    (1, 1, 1, 1),
    (0, 3, 4, 4),
    (2, 3, 0, 5),
    (2, 3, 5, 7),
    (3, 1, 8, 8),
    (1, 3, 16, 16),
    (5, 3, 17, 19),
    (2, 3, 2, 3, 5),
    (1, 2, 4, 4, 8),
]

DENSE = ("contiguous", "channels_last", "permuted", "transposed")
VIEWS = ("misaligned", "sliced", "padded_rows")
LAYOUTS = DENSE + VIEWS + ("expanded",)

BOXES = (
    (0.0, 1.0),
    (-1.0, 1.0),
    (0.1, 0.9),
    (-0.51, 0.26),
    (-0.001, 0.001),
    (0.3, 0.3),
    (-np.inf, np.inf),
    (-2.0, 300.0),
)
EPS = (8 / 255, 4 / 255, 1 / 255, 0.0, 1e-6, 0.3, 2.0, np.inf)
ALPHA = (2 / 255, 10 / 255, 1e-3, 0.0, -2 / 255, -0.4)


# ------------------------------------------------------------------------------------------------- layouts


def laid_out(array, dtype, layout, rng):
    """A tensor of dtype with the array's values, in the layout. The storage's gaps hold NaN (or 255)."""
    shape = array.shape
    if layout == "expanded":
        keep = tuple(slice(0, 1) if rng.random() < 0.5 else slice(None) for _ in shape)
        return laid_out(np.asarray(array[keep]), dtype, "contiguous", rng).expand(shape)
    view = blank(shape, dtype, layout, rng)
    view.copy_(torch.from_numpy(np.ascontiguousarray(array)).reshape(shape))  # NumPy makes a 0-dim array 1-dim
    return view


def blank(shape, dtype, layout, rng):
    """A tensor of dtype, shape and layout whose whole storage is poisoned."""
    rank = len(shape)

    def filled(size):
        return torch.full(size, 255 if dtype == torch.uint8 else torch.nan, dtype=dtype)

    if layout == "misaligned":
        return filled((int(np.prod(shape, dtype=np.int64)) + 1,))[1:].view(shape)
    if layout == "sliced" and rank:
        steps = [int(rng.integers(1, 4)) for _ in shape]
        steps[int(rng.integers(rank))] = 2
        starts = [int(rng.integers(0, s)) for s in steps]
        base = filled([n * s for n, s in zip(shape, steps, strict=True)])
        return base[tuple(slice(a, None, s) for a, s in zip(starts, steps, strict=True))]
    if layout == "padded_rows" and rank:
        return filled((*shape[:-1], shape[-1] + 3))[..., 2 : 2 + shape[-1]]
    order = list(range(rank))
    if layout == "channels_last" and rank >= 3:
        order = [0, *range(2, rank), 1]
    elif layout == "permuted":
        order = rng.permutation(rank).tolist()
    elif layout == "transposed":
        order = order[::-1]
    return filled([shape[d] for d in order]).permute([order.index(d) for d in range(rank)])


def whole_storage(t):
    """The whole storage of t, with the elements that t does not reach, as a flat tensor on the same memory."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def on(t, device):
    """The same view of a copy of t's whole storage on the device; another object than a tensor is returned itself."""
    if not isinstance(t, torch.Tensor):
        return t
    return whole_storage(t).clone().to(device).as_strided(t.shape, t.stride(), t.storage_offset())


# -------------------------------------------------------------------------------------------------- values


def tiny(dtype):
    """The smallest positive (subnormal) value of the dtype."""
    return {
        torch.float64: 2.0**-1074,
        torch.float32: 2.0**-149,
        torch.float16: 2.0**-24,
        torch.bfloat16: 2.0**-133,
    }[dtype]


def scatter(rng, array, specials, share=0.15):
    """Put the special values at random places, about this share of all places."""
    where = rng.random(array.shape) < share
    return np.where(where, rng.choice(np.asarray(specials, np.float64), array.shape), array)


def gradient_values(rng, shape, dtype):
    lim = torch.finfo(dtype)
    special = [
        np.nan,
        np.inf,
        -np.inf,
        0.0,
        -0.0,
        tiny(dtype),
        -3 * tiny(dtype),
        lim.tiny,
        -lim.tiny,
        lim.max,
    ]
    # Few normal values reach the subnormals of a narrow type by themselves.
    return scatter(rng, rng.normal(size=shape) * 10.0 ** rng.integers(-6, 2), special, rng.choice([0.0, 0.3]))


def image_values(rng, shape, dtype, box, grid):
    """Pixels in and around the box; `grid` is the result dtype's smallest step, for images around zero."""
    lo, hi = (float(np.clip(b, -4, 4)) for b in box)
    kind = rng.choice(["pixels", "codes", "around zero", "wild"], p=[0.5, 0.15, 0.2, 0.15])
    if kind == "codes":
        return rng.integers(0, 256, shape) / 255
    if kind == "around zero":
        return rng.integers(-5, 6, shape) * grid * float(rng.choice([0.5, 1.0, 1.25]))
    v = rng.uniform(lo, hi, shape)
    v = scatter(rng, v, [lo, hi, 0.0, -0.0, lo - 0.05, hi + 0.05], 0.3)
    if kind == "wild":
        lim = torch.finfo(dtype)
        v = scatter(rng, v, [np.nan, np.inf, -np.inf, lim.max, -lim.max, tiny(dtype), -tiny(dtype), lim.tiny])
    return v


def parameter_tensor(rng, value, shape, kind, spread):
    """A parameter tensor of the kind around the value, in a random float dtype."""
    rank = len(shape)
    size = {"0d": (), "N": shape[:1], "C": (1, *shape[1:2]), "NC": shape[:2]}[kind]
    size = size + (1,) * (rank - len(size)) if kind != "0d" else ()
    numbers = torch.from_numpy(np.asarray(spread(value, rng.random(size)), np.float64).reshape(size))
    return numbers.to(FLOATS[rng.integers(3)] if np.isfinite(value) else torch.float32)


def scaled(value, u):
    return value * (0.5 + u) if np.isfinite(value) else np.full_like(u, value)


def lower(value, u):
    return value - 0.1 * u


def higher(value, u):
    return value + 0.1 * u


# --------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """The choices of one call; `call()` builds its tensors and arguments."""

    op: str
    shape: tuple
    x: torch.dtype
    x_adv: torch.dtype
    grad: torch.dtype
    out: torch.dtype
    layouts: dict = field(hash=False)  # of x, x_adv, grad, out
    params: dict = field(hash=False)  # name -> (number, kind), the kind "number", "0d", "N", "C" or "NC"
    seed: int
    seed_kind: str
    project: bool
    numbers: int  # the seed of NumPy's generator

    def call(self):
        rng = np.random.default_rng(self.numbers)
        params, box = dict(self.params), (self.params["lo"][0], self.params["hi"][0])
        grid = tiny(self.out)
        x = rng.integers(0, 256, self.shape).astype(np.uint8)
        if self.x != torch.uint8:
            x = image_values(rng, self.shape, self.x, box, grid)
            if np.all(np.abs(x) < 16 * grid) and rng.random() < 0.8:  # rounding and step 2 then meet zero
                params = {
                    k: (v[0] if k in ("lo", "hi") else grid * rng.integers(0, 9) / 4, v[1]) for k, v in params.items()
                }
        tensors = {"x": laid_out(x, self.x, self.layouts["x"], rng)}
        if self.op == "pgd_step":
            tensors["x_adv"] = laid_out(self.moved(rng, tensors["x"], params), self.x_adv, self.layouts["x_adv"], rng)
        if self.op != "random_init":
            grad = gradient_values(rng, self.shape, self.grad)
            tensors["grad"] = laid_out(grad, self.grad, self.layouts["grad"], rng)
        out = blank(self.shape, self.out, self.layouts["out"], rng)
        return Call(self.op, tensors, self.arguments(rng, params), out)

    def moved(self, rng, x, params):
        """An iterate of an attack: in the ball, at its border, or outside of it; sometimes NaN."""
        v = oracle.image(x, np.float64)
        eps = params["eps"][0] if np.isfinite(params["eps"][0]) else 1.0
        v = v + eps * rng.choice([-1.0, -0.5, 0.0, 0.3, 1.0, 1.5], self.shape)
        return scatter(rng, v, [np.nan, 0.0, torch.finfo(self.x_adv).max, np.inf], rng.choice([0.0, 0.05]))

    def arguments(self, rng, params):
        spread = {"lo": lower, "hi": higher}
        arg = {
            name: value
            if kind == "number"
            else parameter_tensor(rng, value, self.shape, kind, spread.get(name, scaled))
            for name, (value, kind) in params.items()
            if value is not None
        }
        made = {"clip": (arg.pop("lo"), arg.pop("hi"))}
        if self.op == "random_init":
            return {**made, "noise": arg["noise"], "seed": self.made_seed()}
        made["eps"] = arg["eps"]
        if self.op == "pgd_step":
            return {**made, "alpha": arg.get("alpha", 2 / 255)}
        seed = self.made_seed() if isinstance(arg["noise"], torch.Tensor) or arg["noise"] != 0 else None
        return {
            **made,
            "alpha": arg.get("alpha"),
            "noise": arg["noise"],
            "seed": seed,
            "project": self.project,
        }

    def made_seed(self):
        if self.seed_kind == "int":
            return self.seed
        signed = (self.seed & oracle.M64) - (1 << 64 if self.seed & (1 << 63) else 0)
        if self.seed_kind == "0d":
            return torch.tensor(signed)
        n = self.shape[0] if self.seed_kind == "N" else 1
        return torch.from_numpy(np.random.default_rng(self.seed & oracle.M64).integers(-(2**63), 2**63, n))


@dataclass
class Call:
    """An op's tensors, its other arguments, and a poisoned `out` for its result."""

    op: str
    tensors: dict
    arguments: dict
    out: torch.Tensor

    def on(self, device):
        """A deep copy on the device; every storage keeps its gaps."""
        args = {k: tuple(on(b, device) for b in v) if k == "clip" else on(v, device) for k, v in self.arguments.items()}
        return Call(self.op, {k: on(t, device) for k, t in self.tensors.items()}, args, on(self.out, device))

    def compute_type(self):
        return oracle.compute_type(self.out.dtype, *(t.dtype for k, t in self.tensors.items() if k != "grad"))

    def everything(self):
        """Every tensor that the op reads."""
        a = self.arguments
        return [t for t in (*self.tensors.values(), *a["clip"], *a.values()) if isinstance(t, torch.Tensor)]

    def run(self, module, suffix="", **out):
        """The call through `fastadv` (or, with dtype=, through the oracle)."""
        t, a = self.tensors, dict(self.arguments)
        f = getattr(module, self.op + suffix)
        if self.op == "random_init":
            return f(t["x"], a.pop("noise"), **a, **out)
        if self.op == "fgsm_step":
            return f(t["x"], t["grad"], a.pop("eps"), **a, **out)
        return f(t["x_adv"], t["grad"], t["x"], **a, **out)


def mostly(*choices):
    """The first choice half of the time, because most examples should be like the calls of users."""
    return st.one_of(st.just(choices[0]), st.sampled_from(choices))


@st.composite
def cases(draw, op):
    shape = draw(st.sampled_from(SHAPES))
    kinds = ["number", "0d"] + (["N", "C", "NC"] if len(shape) >= 2 else [])
    kind = mostly(*kinds)
    box = draw(mostly(*BOXES))
    eps = draw(st.sampled_from(EPS))
    alpha = draw(st.sampled_from(ALPHA if np.isinf(eps) else (*ALPHA, None)))
    noise = draw(st.sampled_from((0.0, 8 / 255, 16 / 255, 1e-5, 1.0)))
    values = {"eps": eps, "alpha": alpha, "noise": noise, "lo": box[0], "hi": box[1]}
    first = draw(st.sampled_from(LAYOUTS))
    mixed = draw(st.booleans())
    layouts = {name: draw(st.sampled_from(LAYOUTS)) if mixed else first for name in ("x", "x_adv", "grad", "out")}
    if layouts["out"] == "expanded":
        layouts["out"] = "contiguous"
    dtypes = st.sampled_from((torch.float32, *FLOATS))
    return Case(
        op=op,
        shape=shape,
        x=draw(st.sampled_from((torch.float32, *FLOATS, torch.uint8))),
        x_adv=draw(dtypes),
        grad=draw(dtypes),
        out=draw(dtypes),
        layouts=layouts,
        params={k: (v, draw(kind) if v is not None else "number") for k, v in values.items()},
        seed=draw(st.one_of(st.sampled_from((0, 1, -1, -(2**63), 2**63, 2**64 - 1)), st.integers(-(2**63), 2**64 - 1))),
        # A sample is a program of the grid, and Triton's interpreter takes 80 ms for one.
        seed_kind=draw(st.sampled_from(("int", "0d", "1", "N") if shape and shape[0] <= 64 else ("int", "0d", "1"))),
        project=draw(mostly(True, False)),
        numbers=draw(st.integers(0, 2**32 - 1)),
    )


def without_out(case):
    """The case for a result that the op allocates; the op chooses its dtype."""
    return replace(
        case, out=case.x_adv if case.op == "pgd_step" else torch.float32 if case.x == torch.uint8 else case.x
    )


@dataclass(frozen=True)
class ModelInput:
    """The choices of a normalisation and of its z; `made()` builds both for a case."""

    z: torch.dtype
    layout: str
    per_channel: bool
    numbers: int

    def made(self, case):
        rng = np.random.default_rng(self.numbers)
        channels = case.shape[1] if len(case.shape) >= 2 else 0
        size = (channels,) if self.per_channel and channels else ()
        rare = rng.choice([0.0, 0.2])
        mean = scatter(rng, rng.normal(size=size) / 2, [0.0, 1e-45, -1e30, 1e300], rare)
        std = scatter(rng, rng.uniform(0.05, 3, size), [1.0, 1 / 3, 1e-40, 1e30, 1e-310], rare)
        normalization = fastadv.Normalization(mean.tolist(), std.tolist() if rng.random() < 0.9 else float(std.max()))
        return normalization, blank(case.shape, self.z, self.layout, rng)


def model_inputs():
    return st.builds(
        ModelInput,
        z=st.sampled_from(FLOATS),
        layout=mostly(*DENSE, *VIEWS),
        per_channel=mostly(True, False),
        numbers=st.integers(0, 2**32 - 1),
    )


def calls_on_every_16_bit_value(dtype, device="cpu"):
    """Calls of the ops on the values of the dtype; many results leave the ball and are pulled back."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.abs() < 60_000].to(device)
    grad = torch.randn(x.shape).to(device)
    for radius in (8 / 255, 0.1, 2.0**-12, 3.0, torch.rand(()).item()):
        options = {"clip": (-65_000, 65_000)}
        yield functools.partial(fastadv.fgsm_step, x, grad, radius, **options)
        yield functools.partial(fastadv.random_init, x, radius, seed=5, **options)
        yield functools.partial(fastadv.fgsm_step, x, grad, radius, noise=radius, seed=6, **options)
        # A start at the ball's edge, where the nearer neighbour is often outside of the ball.
        start = (x.double() + radius * (1 - torch.rand(x.shape, device=x.device) / 50)).to(dtype)
        yield functools.partial(fastadv.pgd_step, start, grad, x, alpha=radius / 9, eps=radius, **options)
