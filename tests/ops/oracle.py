"""An independent NumPy oracle of the L-inf ops, written from the numeric contract and not from the code.

Every value lives in a float64 array, which holds each of the smaller formats exactly. So if two such arrays are
equal (NaN equals NaN), the values are what the contract calls "bit for bit" equal: in all bits but the sign of a
zero and the payload of a NaN. Arithmetic happens in NumPy's float32 or float64, with one rounding for each
operation. Only two things come from torch: the bytes of a tensor, and the strides of `torch.empty_like(x)`.
"""

import numpy as np
import torch

M64 = (1 << 64) - 1

# Explicit significand bits, smallest normal exponent, largest exponent.
FORMATS = {torch.float32: (23, -126, 127), torch.float16: (10, -14, 15), torch.bfloat16: (7, -126, 127)}
NUMPY = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16}


# ---------------------------------------------------------------------------------------------- tensors


def values(t):
    """The exact values of a floating-point tensor, as float64."""
    t = t.detach().cpu()
    if t.dtype == torch.bfloat16:
        bits = t.view(torch.int16).numpy().astype(np.uint32) & 0xFFFF
        return (bits << np.uint32(16)).view(np.float32).astype(np.float64)
    return t.numpy().astype(np.float64)


def same(a, b):
    """Whether both are equal, but for the sign of a zero and the payload of a NaN."""
    return a.shape == b.shape and bool(np.all((a == b) | (np.isnan(a) & np.isnan(b))))


def mismatch(got, want):
    """A short account of where two arrays of values differ, for an assertion's message."""
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    bad = np.argwhere(~((got == want) | (np.isnan(got) & np.isnan(want))))
    where = [tuple(int(k) for k in i) for i in bad[:3]]
    first = ", ".join(f"{i}: got {got[i].item()!r}, expected {want[i].item()!r}" for i in where)
    return f"{len(bad)} of {got.size} elements differ; {first}"


# ------------------------------------------------------------------------------------------------ rounding


def round_to(v, dtype):
    """v (float64 values), rounded once, to nearest even, to dtype."""
    v = np.asarray(v, np.float64)
    if dtype == torch.float64:
        return v
    bits, emin, emax = FORMATS[dtype]
    finite = np.isfinite(v)
    safe = np.where(finite, v, 0.0)
    exponent = np.maximum(np.frexp(safe)[1] - 1, emin)
    # Scaling by a power of two is exact here, so only rint rounds.
    out = np.ldexp(np.rint(np.ldexp(safe, bits - exponent)), exponent - bits)
    out = np.where(np.abs(out) >= np.ldexp(1.0, emax + 1), np.copysign(np.inf, out), out)
    return np.where(finite, out, v)


def next_toward(w, target, dtype):
    """The neighbour of w (values of dtype) on target's side, also across zero."""
    w, target = np.broadcast_arrays(np.asarray(w, np.float64), np.asarray(target, np.float64))
    up = target > w
    if dtype in NUMPY:
        t = NUMPY[dtype]
        return np.nextafter(w.astype(t), np.where(up, t(np.inf), t(-np.inf))).astype(np.float64)
    # For bfloat16 the signed index of a value on the number line is moved by one step.
    bits = (w.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.int64)
    line = np.where(bits & 0x8000, -(bits & 0x7FFF), bits) + np.where(up, 1, -1)
    bits = np.where(line < 0, 0x8000 | -line, line).astype(np.uint32)
    return (bits << np.uint32(16)).view(np.float32).astype(np.float64)


def round_up(v, dtype):
    r = round_to(v, dtype)
    return np.where(r < v, next_toward(r, np.inf, dtype), r)


def round_down(v, dtype):
    r = round_to(v, dtype)
    return np.where(r > v, next_toward(r, -np.inf, dtype), r)


# --------------------------------------------------------------------------------------------- random bits


def philox4x32(counter, key):
    """Philox-4x32-10 of four counter and two key words (numbers or arrays); returns four uint64 arrays."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = (np.asarray(k, np.uint64) for k in key)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ k0,
            p1 & mask,
            (p0 >> np.uint64(32)) ^ c3 ^ k1,
            p0 & mask,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1, c2, c3


def words(v):
    """The low and the high 32-bit word of 64-bit integers, signed or not, as uint64 arrays."""
    v = np.asarray(np.uint64(v & M64)) if isinstance(v, int) else np.asarray(v).astype(np.int64).view(np.uint64)
    return v & np.uint64(0xFFFFFFFF), v >> np.uint64(32)


def philox_groups(seed, groups):
    """The four words of each group of eight elements, int64 [len(groups), 4]."""
    low, high = words(np.asarray(groups))
    zero = np.zeros_like(low)
    return np.stack(philox4x32((low, high, zero, zero), words(seed)), axis=-1).astype(np.int64)


def random_halves(seed, position):
    """h, the 16 random bits of each position (an int64 array; an array of seeds broadcasts against it)."""
    if not isinstance(seed, int):
        seed, position = np.broadcast_arrays(seed, position)
    low, high = words(position >> 3)
    zero = np.zeros_like(low)
    out = np.stack(philox4x32((low, high, zero, zero), words(seed)))
    j = position & 7
    word = np.take_along_axis(out, (j >> 1)[None], axis=0)[0].astype(np.int64)
    return np.where(j & 1, word >> 16, word & 0xFFFF)


def sample_seeds(seed, index, restart=0):
    low, high = words(np.asarray(index, np.int64))
    w = philox4x32((low, high, np.full_like(low, restart), np.ones_like(low)), words(seed))
    return (w[0] | (w[1] << np.uint64(32))).view(np.int64)


def positions(x):
    """Each element's offset in `torch.empty_like(x)`."""
    strides = torch.empty_like(x).stride()
    at = np.zeros(tuple(x.shape), np.int64)
    for dim, (size, stride) in enumerate(zip(x.shape, strides, strict=True)):
        at += (np.arange(size, dtype=np.int64) * stride).reshape([-1 if d == dim else 1 for d in range(x.dim())])
    return at


def halves(x, seed):
    """The 16 random bits of every element of the tensor x, for an int, one-element or per-sample seed."""
    if isinstance(seed, int):
        return random_halves(seed, positions(x))
    seed = seed.detach().cpu().numpy()
    if seed.size == 1:
        return random_halves(seed.reshape(()), positions(x))
    assert seed.shape == tuple(x.shape[:1])
    if x.shape[0] == 0:
        return np.zeros(tuple(x.shape), np.int64)
    # A sample is drawn like a tensor of its own; all samples have the strides of the first.
    return random_halves(seed.reshape(-1, *[1] * (x.dim() - 1)), positions(x[0])[None])


# ------------------------------------------------------------------------------------------------- the ops


def compute_type(*dtypes):
    return np.float64 if torch.float64 in dtypes else np.float32


def image(x, c):
    """The image in the compute type; a uint8 code means code/255, rounded once."""
    if x.dtype == torch.uint8:
        return x.detach().cpu().numpy().astype(c) / c(255)
    return values(x).astype(c)


def parameter(p, c):
    return (values(p) if isinstance(p, torch.Tensor) else np.float64(p)).astype(c)


def sign(g):
    v = values(g)
    return np.where(np.isnan(v), 0.0, np.sign(v))


def clamp(v, lo, hi):
    """NaN stays; where lo > hi the upper bound wins, as in torch.clamp."""
    return np.where(np.isnan(v), v, np.minimum(np.maximum(v, lo), hi))


def finish(t, x, radius, clip, c, dtype):
    w = round_to(t, dtype)
    outside = np.abs(w.astype(c) - x) > radius
    w = np.where(outside, next_toward(w, x, dtype), w)
    lo, hi = (parameter(b, c).astype(np.float64) for b in clip)
    return clamp(w, round_up(lo, dtype), round_down(hi, dtype))


def image_dtype(x):
    return torch.float32 if x.dtype == torch.uint8 else x.dtype


def random_init(x, noise, *, seed, clip=(0, 1), dtype=None):
    """Values of `fastadv.random_init`; dtype is that of `out`, None without one."""
    dtype = dtype or image_dtype(x)
    c = compute_type(x.dtype, dtype)
    with np.errstate(all="ignore"):
        v, noise = image(x, c), parameter(noise, c)
        k = (2 * halves(x, seed) - 65535).astype(c)
        t = v + (noise * c(2.0**-16)) * k
        return finish(t, v, noise, clip, c, dtype)


def fgsm_step(x, grad, eps, *, alpha=None, noise=0.0, seed=None, project=True, clip=(0, 1), dtype=None):
    dtype = dtype or image_dtype(x)
    c = compute_type(x.dtype, dtype)
    with np.errstate(all="ignore"):
        v, eps = image(x, c), parameter(eps, c)
        alpha = eps if alpha is None else parameter(alpha, c)
        x0 = v
        if isinstance(noise, torch.Tensor) or noise != 0:  # the start is the image that the model saw
            x0 = random_init(x, noise, seed=seed, clip=clip).astype(c)
        moved = x0 + alpha * sign(grad).astype(c)
        if not project:
            return finish(moved, v, c(np.inf), clip, c, dtype)
        return finish(v + clamp(moved - v, -eps, eps), v, eps, clip, c, dtype)


def pgd_step(x_adv, grad, x, *, alpha, eps, clip=(0, 1), dtype=None):
    dtype = dtype or x_adv.dtype
    c = compute_type(x_adv.dtype, x.dtype, dtype)
    with np.errstate(all="ignore"):
        v, eps, alpha = image(x, c), parameter(eps, c), parameter(alpha, c)
        moved = values(x_adv).astype(c) + alpha * sign(grad).astype(c)
        return finish(v + clamp(moved - v, -eps, eps), v, eps, clip, c, dtype)


def model_input(w, mean, std, c, dtype):
    """z in dtype for an image's values w, in two operations of compute type c; mean and std: numbers or per channel."""

    def across(v):
        return v if v.ndim == 0 else v.reshape(-1, *[1] * (w.ndim - 2))

    with np.errstate(all="ignore"):
        mean, scale = np.asarray(mean, np.float64).astype(c), (1 / np.asarray(std, np.float64)).astype(c)
        return round_to((w.astype(c) - across(mean)) * across(scale), dtype)
