"""The ops in plain PyTorch: the executable specification, and the backend of any device that has no other.

Written to be read beside contract.md, line by line; what is fast is elsewhere. One rounding per operation, so no
`add(..., alpha=)`, no `lerp`, no division by a Python number (on some devices that multiplies by its reciprocal).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastadv.ops.positions import position_strides

_MASK = 0xFFFFFFFF
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by bytes


# ---------------------------------------------------------------- random bits


def _mulhilo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    product = a * b  # wraps modulo 2^64: the bits are right whatever the sign
    return (product >> 32) & _MASK, product & _MASK


def philox(
    key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 on int64 tensors that hold uint32 words.

    Args:
        key: 2 broadcastable tensors.
        counter: 4 broadcastable tensors.

    Returns:
        4 int64 tensors.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        hi0, lo0 = _mulhilo(c0, 0xD2511F53)
        hi1, lo1 = _mulhilo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _words(t: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper 32 bits of each int64."""
    return t & _MASK, (t >> 32) & _MASK


def philox_op(out: Tensor, seed: Tensor, index: Tensor, restart: Tensor, word3: int) -> None:
    lo, hi = _words(index)
    words = philox(_words(seed), (lo, hi, restart & _MASK, torch.full_like(lo, word3)))
    out.copy_(torch.stack(words, dim=-1))


def _element_bits(x: Tensor, seed: Tensor) -> Tensor:
    """The 16 random bits of every element of x: int64, x's shape; `seed` has one element or shape (N,)."""
    per_sample = seed.dim() == 1 and seed.numel() != 1
    blocks = x.shape[0] if per_sample else 1
    size = x.numel() // max(blocks, 1)
    lo, hi = _words(torch.arange((size + 7) // 8, device=x.device))
    zero = torch.zeros_like(lo)
    words = torch.stack(philox(_words(seed.reshape(-1, 1)), (lo, hi, zero, zero)), dim=-1)  # [blocks, groups, 4]
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)[:, :size].contiguous()
    return halves.as_strided(x.shape, position_strides(x, per_sample))


# ---------------------------------------------------------------- rounding


def _to_odd_float32(t: Tensor) -> Tensor:
    """float64 to float32, rounded to odd: a second rounding, to 16 bits, then gives what a single one gives."""
    near = t.to(torch.float32)
    back = near.to(torch.float64)
    bits = near.view(torch.int32)
    inexact = (back != t) & ~t.isnan()
    bits = torch.where(inexact & (back.abs() > t.abs()), bits - 1, bits)
    return torch.where(inexact, bits | 1, bits).view(torch.float32)


def _round(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t rounded to nearest even, once."""
    if t.dtype == torch.float64 and dtype in (torch.float16, torch.bfloat16):
        t = _to_odd_float32(t)
    return t.to(dtype)


def _neighbour(w: Tensor, up: Tensor) -> Tensor:
    """The next value of w's dtype, above where `up` and below elsewhere; works through zero."""
    bits = w.view(_BITS[w.itemsize])
    lowest = torch.iinfo(bits.dtype).min
    order = torch.where(bits < 0, lowest - bits, bits)  # monotone in w, with +0 and -0 both 0
    order = torch.where(up, order + 1, order - 1)
    return torch.where(order < 0, lowest - order, order).view(w.dtype)


def _round_inward(bound: Tensor, dtype: torch.dtype, up: bool) -> Tensor:
    """A bound of the box (in the compute type) rounded up or down to dtype."""
    w = _round(bound, dtype)
    back = w.to(bound.dtype)
    outside = back < bound if up else back > bound
    return torch.where(outside, _neighbour(w, torch.full_like(outside, up)), w).to(bound.dtype)


def _finish(t: Tensor, x: Tensor, radius: Tensor, lo: Tensor, hi: Tensor, dtype: torch.dtype) -> Tensor:
    """t rounded to dtype, one value of dtype nearer to x where it left the ball of `radius`, clamped to the box."""
    w = _round(t, dtype)
    back = w.to(x.dtype)
    w = torch.where((back - x).abs() > radius, _neighbour(w, back < x), w)
    lo, hi = _round_inward(lo, dtype, up=True), _round_inward(hi, dtype, up=False)
    return torch.minimum(torch.maximum(w.to(x.dtype), lo), hi).to(dtype)


# ---------------------------------------------------------------- the formulas


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def to_compute(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A pixel in the compute type; uint8 means x/255, correctly rounded."""
    if x.dtype == torch.uint8:
        return x.to(dtype) / torch.full((), 255, dtype=dtype, device=x.device)
    return x.to(dtype)


def sign(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """0 for 0 and NaN, else +1 or -1, taken in grad's own dtype."""
    return (grad > 0).to(dtype) - (grad < 0).to(dtype)


def parameter(number: float, tensor: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The number, or the tensor that overrides it, as a tensor of dtype on x's device."""
    return torch.full((), number, dtype=dtype, device=x.device) if tensor is None else tensor.to(dtype)


def draw_noise(x: Tensor, noise: Tensor, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """n of contract.md: a multiple of noise * 2^-16, in x's shape and the compute type."""
    k = 2 * _element_bits(x, seed) - 65535
    return (noise * 2.0**-16) * k.to(dtype)


def seed_tensor(seed: int, seed_t: Tensor | None, x: Tensor) -> Tensor:
    """The seed, or the tensor that overrides it, as an int64 tensor on x's device."""
    return torch.full((), seed, dtype=torch.int64, device=x.device) if seed_t is None else seed_t


def random_init(
    out: Tensor, x: Tensor, noise: float, seed: int, lo: float = 0.0, hi: float = 1.0,
    noise_t: Tensor | None = None, seed_t: Tensor | None = None, lo_t: Tensor | None = None, hi_t: Tensor | None = None,
) -> None:  # fmt: skip
    c = compute_dtype(x, out)
    radius, low, high = (parameter(*p, x, c) for p in ((noise, noise_t), (lo, lo_t), (hi, hi_t)))
    x_c = to_compute(x, c)
    t = x_c + draw_noise(x, radius, seed_tensor(seed, seed_t, x), c)
    out.copy_(_finish(t, x_c, radius, low, high, out.dtype))


def _step(
    x0: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor, lo: Tensor, hi: Tensor,
    dtype: torch.dtype, project: bool = True,
) -> Tensor:  # fmt: skip
    """The sign step from x0 around the clean image x, both in the compute type; the result is of dtype."""
    s = alpha * sign(grad, x.dtype)
    if not project:
        return _finish(x0 + s, x, torch.full_like(eps, float("inf")), lo, hi, dtype)
    d = (x0 + s) - x
    t = x + torch.minimum(torch.maximum(d, -eps), eps)
    return _finish(t, x, eps, lo, hi, dtype)


def pgd_step(
    out: Tensor, x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, lo: float = 0.0, hi: float = 1.0,
    alpha_t: Tensor | None = None, eps_t: Tensor | None = None, lo_t: Tensor | None = None, hi_t: Tensor | None = None,
) -> None:  # fmt: skip
    c = compute_dtype(x_adv, x, out)
    pairs = ((alpha, alpha_t), (eps, eps_t), (lo, lo_t), (hi, hi_t))
    size, radius, low, high = (parameter(*p, x, c) for p in pairs)
    out.copy_(_step(to_compute(x_adv, c), grad, to_compute(x, c), size, radius, low, high, out.dtype))


def fgsm_step(
    out: Tensor, x: Tensor, grad: Tensor, project: bool, alpha: float, eps: float, noise: float, seed: int,
    lo: float = 0.0, hi: float = 1.0,
    alpha_t: Tensor | None = None, eps_t: Tensor | None = None, noise_t: Tensor | None = None,
    seed_t: Tensor | None = None, lo_t: Tensor | None = None, hi_t: Tensor | None = None,
) -> None:  # fmt: skip
    c = compute_dtype(x, out)
    x0 = x
    if noise_t is not None or noise != 0:
        # What random_init returned and the model saw: in x's dtype, whatever out's is.
        x0 = torch.empty_like(x, dtype=torch.float32 if x.dtype == torch.uint8 else x.dtype)
        random_init(x0, x, noise, seed, lo, hi, noise_t, seed_t, lo_t, hi_t)
    pairs = ((alpha, alpha_t), (eps, eps_t), (lo, lo_t), (hi, hi_t))
    size, radius, low, high = (parameter(*p, x, c) for p in pairs)
    out.copy_(_step(to_compute(x0, c), grad, to_compute(x, c), size, radius, low, high, out.dtype, project))


def normalized(w: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The model's input for an image, in dtype; mean and scale are of the compute type and broadcast."""
    return _round((w.to(mean.dtype) - mean) * scale, dtype)


def _with_z(step: Callable[..., None]) -> Callable[..., None]:
    """The step that also writes z, the model's input for its result."""

    def run(out: Tensor, z: Tensor, mean: Tensor, scale: Tensor, *args: Any) -> None:
        step(out, *args)
        z.copy_(normalized(out, mean, scale, z.dtype))

    return run


_STEPS: dict[str, Callable[..., None]] = {"random_init": random_init, "fgsm_step": fgsm_step, "pgd_step": pgd_step}
IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    **_STEPS,
    **{f"{name}_z": _with_z(step) for name, step in _STEPS.items()},
    "philox": philox_op,
}
