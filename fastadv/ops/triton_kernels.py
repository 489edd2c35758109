"""The Triton kernels: one pass each, compiled for NVIDIA and ROCm, or run by Triton's interpreter on the CPU.

`vectorised_kernel` serves tensors that all lie densely in one order, with parameters that are numbers;
`strided_kernel` serves everything else by computing every element's place. The arithmetic of both is `_element`:
csrc/attack_math.h says why it is written as it is.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from fastadv.ops.positions import position_strides
from fastadv.ops.reference import compute_dtype, seed_tensor

Parameter = tuple[float, Tensor | None]  # a number, and the tensor that overrides it
Flags = tuple[bool, ...]

INTERPRETED = triton.knobs.runtime.interpret

# The interpreter's cost is the number of programs.
BLOCK = 4096 if INTERPRETED else 1024
MOST_SAMPLES = 65535  # in one launch, with a seed each: the most that a grid's second dimension has
# Each operation rounds once: a fused multiply-add would not.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

_HERE = contextlib.nullcontext()

_TL = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


_HIP = tl.constexpr(not INTERPRETED and torch.version.hip is not None)
_PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)

# 1/255 in two parts: the first has so few bits that a uint8's product with it is exact.
_HIGH = tl.constexpr(257 / 65536)
_LOW = tl.constexpr(1 / 255 - 257 / 65536)


# ---------------------------------------------------------------- arithmetic


@triton.jit
def _to_odd_float32(t):
    """float64 to float32, rounded to odd: a second rounding, to 16 bits, then gives what a single one gives."""
    near = t.to(tl.float32)
    back = near.to(tl.float64)
    bits = near.to(tl.int32, bitcast=True)
    inexact = (back != t) & (t == t)
    bits = tl.where(inexact & (tl.abs(back) > tl.abs(t)), bits - 1, bits)
    return tl.where(inexact, bits | 1, bits).to(tl.float32, bitcast=True)


@triton.jit
def _bfloat16_value(t):
    """float32 rounded to bfloat16, as a float32."""
    if _PTX and cuda_capability_geq(8, 0):
        # Two at once is the fast conversion; with 0 for the lower one, its bits are the rounded float's.
        code: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $1, 0f00000000;"
        return tl.inline_asm_elementwise(code, "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1)
    elif _HIP:
        return t.to(tl.bfloat16).to(tl.float32)
    else:  # older GPUs have no conversion, and the interpreter's truncates
        bits = t.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(t == t, rounded.to(tl.float32, bitcast=True), t)


@triton.jit
def _round_to(t, R: tl.constexpr):
    """t rounded to nearest even to R, in t's type."""
    C: tl.constexpr = t.dtype
    if C == R:
        return t
    if R == tl.float32:
        return t.to(R).to(C)
    if C == tl.float64:
        t = _to_odd_float32(t)
    if R == tl.bfloat16:
        return _bfloat16_value(t).to(C)
    return t.to(R).to(C)


@triton.jit
def _next_float32(w, difference, UNIT: tl.constexpr):
    d = difference.to(tl.int32, bitcast=True)
    away_from_zero = (d ^ -1) & -2147483648
    bits = tl.where(w == 0, away_from_zero, w.to(tl.int32, bitcast=True))
    outward = (bits ^ d) >> 31
    return (bits - (outward | 1) * UNIT).to(tl.float32, bitcast=True)


@triton.jit
def _next_float16(w, difference):
    up = difference.to(tl.int32, bitcast=True) < 0
    step = tl.where(up, 5.9604644775390625e-08, -5.9604644775390625e-08)  # 2^-24
    near = tl.where(tl.abs(w) <= 6.103515625e-05, w + step, _next_float32(w, difference, 0x2000))  # 2^-14
    beyond = tl.where(tl.abs(w) > 65504.0, 65504.0, float("inf"))
    return tl.where(tl.abs(near) > 65504.0, tl.where(w > 0, beyond, -beyond), near)


@triton.jit
def _towards(w, difference, R: tl.constexpr):
    """The value of R next to w, one of R's: a smaller one where difference >= 0, else a larger one."""
    C: tl.constexpr = w.dtype
    if R == tl.float64:
        d = difference.to(tl.int64, bitcast=True)
        away_from_zero = (d ^ -1) & (-9223372036854775807 - 1)
        bits = tl.where(w == 0, away_from_zero, w.to(tl.int64, bitcast=True))
        return (bits - (((bits ^ d) >> 63) | 1)).to(tl.float64, bitcast=True)
    if R == tl.float32:
        return _next_float32(w.to(tl.float32), difference.to(tl.float32), 1).to(C)
    if R == tl.bfloat16:
        return _next_float32(w.to(tl.float32), difference.to(tl.float32), 0x10000).to(C)
    return _next_float16(w.to(tl.float32), difference.to(tl.float32)).to(C)


@triton.jit
def _bound(bound, C: tl.constexpr, R: tl.constexpr, UP: tl.constexpr, SIMPLE: tl.constexpr):
    """lo, rounded up to R, or hi, rounded down: in C."""
    bound = tl.cast(bound, C)
    if SIMPLE:
        return bound
    w = _round_to(bound, R)
    if UP:
        return tl.where(w < bound, _towards(w, tl.full(w.shape, -1.0, w.dtype), R), w)
    return tl.where(w > bound, _towards(w, tl.full(w.shape, 1.0, w.dtype), R), w)


@triton.jit
def _clamp(v, lo, hi):
    """NaN stays, and a NaN bound gives NaN."""
    v = tl.maximum(v, lo, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, hi, propagate_nan=tl.PropagateNan.ALL)


def _where_beyond(above: str, below: str) -> tl.constexpr:
    """PTX: $0 = $1, but for `above` where $2 > $3 and `below` where $2 < -$3.

    Additions under predicates: comparisons and selections share a pipe of half the rate.
    """
    return tl.constexpr(
        f"""{{
        .reg .pred above, below;
        .reg .f32 least;
        neg.f32 least, $3;
        setp.gt.f32 above, $2, $3;
        setp.lt.f32 below, $2, least;
        mov.f32 $0, $1;
        @above {above};
        @below {below};
        }}"""
    )


_NUDGE = _where_beyond("sub.rn.f32 $0, $0, $4", "add.rn.f32 $0, $0, $4")
# Less the least of all, rounded down, is the next float.
_PULL_FLOAT32 = _where_beyond("sub.rm.f32 $0, $0, 0f00000001", "add.rp.f32 $0, $0, 0f00000001")


@triton.jit
def _nudged(v, test, limit, step):
    """v - step where test > limit, v + step where test < -limit, else v."""
    if _PTX and v.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            _NUDGE, "=&f,f,f,f,f", [v, test, limit, step], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.where(test > limit, v - step, tl.where(test < -limit, v + step, v))


@triton.jit
def _pulled_float32(w, difference, radius):
    """w, or the float next to it towards x where the difference between them is more than the radius."""
    if _PTX:
        return tl.inline_asm_elementwise(
            _PULL_FLOAT32, "=&f,f,f,f", [w, difference, radius], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.where(tl.abs(difference) > radius, _next_float32(w, difference, 1), w)


@triton.jit
def _to_neighbour(w, R: tl.constexpr):
    """csrc/cuda/pairs.cuh: rounded, w moved by that is its neighbour in R."""
    if R == tl.bfloat16:
        return tl.abs(w) * 0.0046875  # 0.6 * 2^-7
    else:
        return tl.maximum(tl.abs(w) * 0.0005859375, 3.5762786865234375e-08)  # 0.6 * 2^-10, 0.6 * 2^-24


@triton.jit
def _finish(t, x, radius, lo, hi, R: tl.constexpr, ORDINARY: tl.constexpr):
    w = _round_to(t, R)
    difference = w - x
    if w.dtype == tl.float32 and R == tl.float32:
        w = _pulled_float32(w, difference, radius)
    elif ORDINARY and w.dtype == tl.float32 and R != tl.float64:
        w = _round_to(_nudged(w, difference, radius, _to_neighbour(w, R)), R)
    else:
        w = tl.where(tl.abs(difference) > radius, _towards(w, difference, R), w)
    return _clamp(w, lo, hi)


@triton.jit
def _widened(v):
    """16-bit types as float32; bfloat16 by its bits, because the interpreter loses subnormal ones."""
    if v.dtype == tl.bfloat16:
        return (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif v.dtype == tl.float16:
        return v.to(tl.float32)
    else:
        return v


@triton.jit
def _stored(w, R: tl.constexpr):
    """w, a value of R, as one."""
    if R == tl.bfloat16:
        bits = w.to(tl.float32).to(tl.uint32, bitcast=True)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif R == tl.float16:
        return w.to(tl.float32).to(R)
    else:
        return w.to(R)


@triton.jit
def _pixel(x, C: tl.constexpr):
    # As if/else: Triton 3.6 compiles what follows a return, too, and wants one type of all returns.
    if x.dtype != tl.uint8:
        return _widened(x).to(C)
    elif C == tl.float64:
        return x.to(tl.float64) / 255.0
    else:
        code = x.to(tl.float32)
        return code * _HIGH + code * _LOW


@triton.jit
def _last_bits(words, UPPER: tl.constexpr):
    """The lower or upper 16 bits of uint32 words as the last bits of floats: 2^23 + h. Conversions are slow."""
    if _PTX:
        code: tl.constexpr = "prmt.b32 $0, $1, 0x4b00, 0x5432;" if UPPER else "prmt.b32 $0, $1, 0x4b00, 0x5410;"
        return tl.inline_asm_elementwise(code, "=f,r", [words], dtype=tl.float32, is_pure=True, pack=1)
    else:
        h = words >> 16 if UPPER else words & 0xFFFF
        return (h | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _random(seed, first_group, GROUPS: tl.constexpr):
    """2^23 + h of 8 * GROUPS elements, h the 16 random bits of each."""
    group = first_group + tl.arange(0, GROUPS)
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([GROUPS * 4])
    return tl.join(_last_bits(words, False), _last_bits(words, True)).reshape([GROUPS * 8])


@triton.jit
def _start(x, h, noise, lo, hi, R: tl.constexpr, ORDINARY: tl.constexpr):
    C: tl.constexpr = x.dtype
    half = (h - 8388608.0) - 32767.5  # k / 2; h is 2^23 too large
    if not ORDINARY:  # perhaps so small a noise that scale is subnormal
        noise_ = (noise * 0.0000152587890625) * (2 * half).to(C)
    else:
        noise_ = (noise * 0.000030517578125) * half.to(C)
    return _finish(x + noise_, x, noise, lo, hi, R, ORDINARY)


@triton.jit
def _step(x0, grad, x, alpha, eps, lo, hi, R: tl.constexpr, PROJECT: tl.constexpr, ORDINARY: tl.constexpr):
    C: tl.constexpr = x.dtype
    grad = _widened(grad)
    if grad.dtype == tl.float64:  # the sign alone: a subnormal double must not become a float's zero
        grad = (grad > 0).to(tl.float32) - (grad < 0).to(tl.float32)
    if C == tl.float32:
        # -0 moved by nothing is 0, which the ball would see to.
        moved = _nudged(x0 if PROJECT else x0 + 0.0, grad, 0.0, -alpha)
    else:
        moved = x0 + alpha * ((grad > 0).to(C) - (grad < 0).to(C))
    if not PROJECT:
        return _clamp(_round_to(moved, R), lo, hi)
    return _finish(x + _clamp(moved - x, -eps, eps), x, eps, lo, hi, R, ORDINARY)


@triton.jit
def _element(x, x0, grad, h, alpha, eps, noise, lo, hi, C: tl.constexpr, R: tl.constexpr, FLAGS: tl.constexpr):
    """The op on a block of elements.

    FLAGS: which of (noise, step, x0, project, radii of ordinary size, bounds that every type has) there is.
    """
    NOISE: tl.constexpr = FLAGS[0]
    STEP: tl.constexpr = FLAGS[1]
    HAS_X0: tl.constexpr = FLAGS[2]
    ORDINARY: tl.constexpr = FLAGS[4]
    SIMPLE: tl.constexpr = FLAGS[5]
    lo_, hi_ = _bound(lo, C, R, True, SIMPLE), _bound(hi, C, R, False, SIMPLE)
    clean = _pixel(x, C)
    if not STEP:
        return _start(clean, h, tl.cast(noise, C), lo_, hi_, R, ORDINARY)
    if HAS_X0:
        start = _pixel(x0, C)
    elif NOISE:
        # What random_init returned: in x's type (float32 for uint8), computed in float32 unless x is float64.
        C0: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
        R0: tl.constexpr = tl.float32 if x.dtype == tl.uint8 else x.dtype
        lo0, hi0 = _bound(lo, C0, R0, True, SIMPLE), _bound(hi, C0, R0, False, SIMPLE)
        start = _start(_pixel(x, C0), h, tl.cast(noise, C0), lo0, hi0, R0, ORDINARY).to(C)
    else:
        start = clean
    return _step(start, grad, clean, tl.cast(alpha, C), tl.cast(eps, C), lo_, hi_, R, FLAGS[3], ORDINARY)


@triton.jit
def _normalized(w, mean, scale, channel, mask, Z: tl.constexpr):
    """The model's next input for the image w, in Z."""
    z = (w - tl.load(mean + channel, mask)) * tl.load(scale + channel, mask)
    return _stored(_round_to(z, Z), Z)


# ---------------------------------------------------------------- kernels


@triton.jit
def _load_seed(seed, block, PER_SAMPLE: tl.constexpr):
    return tl.load(seed + (block if PER_SAMPLE else 0))


@triton.jit
def vectorised_kernel(
    x, x0, grad, out, z, seed, alpha, eps, noise, lo, hi, mean, scale, channels, inner, size,
    C: tl.constexpr, FLAGS: tl.constexpr, PER_SAMPLE: tl.constexpr, WHOLE: tl.constexpr, ONE_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every tensor dense in the order of the positions; program (i, n): elements i*BLOCK, ... of sample n.

    z: the model's next input, or None; a position's channel is position // inner % channels.
    WHOLE: size is a multiple of BLOCK, and nothing needs a mask. ONE_CHANNEL: inner is, so each program has one.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    block = tl.program_id(1).to(tl.int64)
    offset = block * size + first if PER_SAMPLE else first
    lane = tl.arange(0, BLOCK)
    mask = None if WHOLE else lane < size - first
    h = tl.zeros([BLOCK], tl.float32)
    if FLAGS[0]:
        h = _random(_load_seed(seed, block, PER_SAMPLE), first // 8, BLOCK // 8)
    x_ = tl.load(x + offset + lane, mask)
    x0_ = tl.load(x0 + offset + lane, mask) if FLAGS[2] else x_
    grad_ = tl.load(grad + offset + lane, mask) if FLAGS[1] else x_
    R: tl.constexpr = out.dtype.element_ty
    result = _element(x_, x0_, grad_, h, alpha, eps, noise, lo, hi, C, R, FLAGS)
    tl.store(out + offset + lane, _stored(result, R), mask)
    if z is not None:
        # Divisions are slow, of 64 bits above all: one for all lanes where they share the channel.
        inner_ = tl.cast(inner, tl.uint32)
        if ONE_CHANNEL:
            channel = tl.program_id(0).to(tl.uint32) // (inner_ // BLOCK)
            known = None
        else:
            run = (lane.to(tl.uint32) + (first % inner).to(tl.uint32)) // inner_
            channel = (first // inner % channels).to(tl.uint32) + run
            known = mask
        channel = channel % tl.cast(channels, tl.uint32)
        Z: tl.constexpr = z.dtype.element_ty
        tl.store(z + offset + lane, _normalized(result, mean, scale, channel, known, Z), mask)


@triton.jit
def _place(position, sizes, strides):
    """The offset of each position in a tensor of these strides; dimensions outermost first."""
    offset = tl.zeros_like(position)
    for d in tl.static_range(len(sizes) - 1, -1, -1):
        offset += (position % sizes[d]) * strides[d]
        position = position // sizes[d]
    return offset


@triton.jit
def _parameter(parameter, base_stride, block, position, sizes, strides, mask, IS_TENSOR: tl.constexpr):
    if IS_TENSOR:
        return _widened(tl.load(parameter + block * base_stride + _place(position, sizes, strides), mask))
    else:
        return parameter


@triton.jit
def strided_kernel(
    x, x0, grad, out, z, seed, alpha, eps, noise, lo, hi, mean, scale, channels, inner, size,
    sizes, strides, block_strides, C: tl.constexpr, FLAGS: tl.constexpr, TENSORS: tl.constexpr,
    PER_SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Any layouts, any parameters; strides and block_strides: of the images, then of alpha, eps, noise, lo and hi."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    block = tl.program_id(1).to(tl.int64)
    position = first + tl.arange(0, BLOCK)
    mask = position < size
    h = tl.zeros([BLOCK], tl.float32)
    if FLAGS[0]:
        h = _random(_load_seed(seed, block, PER_SAMPLE), first // 8, BLOCK // 8)
    x_ = tl.load(x + block * block_strides[0] + _place(position, sizes, strides[0]), mask)
    x0_, grad_ = x_, x_
    if FLAGS[2]:
        x0_ = tl.load(x0 + block * block_strides[1] + _place(position, sizes, strides[1]), mask)
    if FLAGS[1]:
        grad_ = tl.load(grad + block * block_strides[2] + _place(position, sizes, strides[2]), mask)
    alpha_ = _parameter(alpha, block_strides[5], block, position, sizes, strides[5], mask, TENSORS[0])
    eps_ = _parameter(eps, block_strides[6], block, position, sizes, strides[6], mask, TENSORS[1])
    noise_ = _parameter(noise, block_strides[7], block, position, sizes, strides[7], mask, TENSORS[2])
    lo_ = _parameter(lo, block_strides[8], block, position, sizes, strides[8], mask, TENSORS[3])
    hi_ = _parameter(hi, block_strides[9], block, position, sizes, strides[9], mask, TENSORS[4])
    R: tl.constexpr = out.dtype.element_ty
    result = _element(x_, x0_, grad_, h, alpha_, eps_, noise_, lo_, hi_, C, R, FLAGS)
    tl.store(out + block * block_strides[3] + _place(position, sizes, strides[3]), _stored(result, R), mask)
    if z is not None:
        place = block * block_strides[4] + _place(position, sizes, strides[4])
        channel = position // inner % channels
        tl.store(z + place, _normalized(result, mean, scale, channel, mask, z.dtype.element_ty), mask)


@triton.jit
def philox_kernel(seed, index, restart, word3, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    index_ = tl.load(index + i, mask)
    low, high = (index_ & 0xFFFFFFFF).to(tl.uint32), (index_ >> 32).to(tl.uint32)
    third = (tl.load(restart + i, mask) & 0xFFFFFFFF).to(tl.uint32)
    fourth = tl.zeros_like(low) + tl.cast(word3, tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed + i, mask), low, high, third, fourth)
    tl.store(out + 4 * i, w0.to(tl.int64), mask)
    tl.store(out + 4 * i + 1, w1.to(tl.int64), mask)
    tl.store(out + 4 * i + 2, w2.to(tl.int64), mask)
    tl.store(out + 4 * i + 3, w3.to(tl.int64), mask)


# ---------------------------------------------------------------- launchers


def _lies_at(t: Tensor, places: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether t's elements lie at their positions."""
    return all(size == 1 or a == b for size, a, b in zip(shape, t.stride(), places, strict=True))


def _strides(t: Tensor | None, order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor in the walk's order; 0 where it broadcasts."""
    if t is None or t.dim() == 0:
        return (0,) * len(order)
    return tuple(t.stride(d) if t.shape[d] != 1 else 0 for d in order)


def _ordinary(x: Tensor, out: Tensor, radii: Sequence[Parameter]) -> bool:
    """Whether csrc/cuda/pairs.cuh's shortcuts are right: radii are 0 or of ordinary size, and `out` can hold x."""
    largest = 8 if out.dtype == torch.float16 else 2.0**100
    fits = out.dtype in (x.dtype, torch.float32)
    return fits and all(t is None and (r == 0 or 2.0**-100 <= r <= largest) for r, t in radii)


def _simple(number: float, tensor: Tensor | None) -> bool:
    """Whether every dtype holds the number exactly, as it does 0, 0.5 and 1."""
    return tensor is None and abs(number) <= 1 and 128 * number % 1 == 0


def _launch_parts(
    x: Tensor, x0: Tensor | None, grad: Tensor | None, out: Tensor, seed: Tensor | None, params: Sequence[Parameter],
    flags: Flags, z: Tensor | None, mean: Tensor | None, scale: Tensor | None,
) -> None:  # fmt: skip
    """Launch for 65535 samples at a time, as many as a grid takes: each has a seed of its own, so the bits stay."""
    n = x.shape[0]
    for first in range(0, n, MOST_SAMPLES):
        rows = slice(first, first + MOST_SAMPLES)

        def part(t: Tensor | None, rows: slice = rows) -> Tensor | None:
            return t[rows] if t is not None and t.dim() > 0 and t.shape[0] == n else t

        parts = [(number, part(t)) for number, t in params]
        _launch(x[rows], part(x0), part(grad), out[rows], part(seed), parts, flags, part(z), mean, scale)


def _launch(
    x: Tensor, x0: Tensor | None, grad: Tensor | None, out: Tensor, seed: Tensor | None, params: Sequence[Parameter],
    flags: Flags, z: Tensor | None = None, mean: Tensor | None = None, scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Choose the kernel and launch it.

    Args:
        x: clean images.
        x0: the iterate, where it is not x or its random start.
        grad: the loss's gradient; None for a start without a step.
        out: takes the result.
        seed: int64, one element or one per sample; None without noise.
        params: alpha, eps, noise, lo and hi.
        flags: which of (noise, step, x0, project) there is.
        z: takes the model's next input.
        mean: of z's normalisation.
        scale: 1/std of it.
    """
    if x.numel() == 0:
        return
    per_sample = seed is not None and seed.numel() != 1
    if per_sample and x.shape[0] > MOST_SAMPLES:
        _launch_parts(x, x0, grad, out, seed, params, flags, z, mean, scale)
        return
    flags = (*flags, _ordinary(x, out, params[1:3]), all(_simple(*bound) for bound in params[3:]))
    places = position_strides(x, per_sample)
    blocks = x.shape[0] if per_sample else 1
    size = x.numel() // blocks
    c = compute_dtype(*(t for t in (x, x0, out) if t is not None))
    if c == torch.float64:  # a number reaches a kernel as a float32
        params = [(0.0, torch.full((), n, dtype=c, device=x.device) if t is None else t) for n, t in params]
    tensors = tuple(t is not None for _, t in params)
    values = [number if t is None else t for number, t in params]
    channels = 1 if mean is None else mean.numel()
    inner = places[1] if channels > 1 else BLOCK
    images = (x, x0, grad, out, z)
    normalization = (mean, scale, channels, inner)
    constants = {"C": _TL[c], "FLAGS": flags, "PER_SAMPLE": per_sample, "BLOCK": BLOCK, **OPTIONS}
    grid = (triton.cdiv(size, BLOCK), blocks)
    with torch.cuda.device(x.device) if x.is_cuda else _HERE:
        narrow = max(channels, inner) + BLOCK < 2**32  # where vectorised_kernel's own divisions are right
        if narrow and not any(tensors) and all(t is None or _lies_at(t, places, x.shape) for t in images):
            whole = {"WHOLE": size % BLOCK == 0, "ONE_CHANNEL": inner % BLOCK == 0}
            vectorised_kernel[grid](*images, seed, *values, *normalization, size, **whole, **constants)
            return
        first_dim = 1 if per_sample else 0
        order = sorted(range(first_dim, x.dim()), key=lambda d: -places[d])
        order = [d for d in order if x.shape[d] != 1] or list(range(x.dim()))[-1:]
        operands = [*images, *(t for _, t in params)]
        strided_kernel[grid](
            *images, seed, *values, *normalization, size, tuple(x.shape[d] for d in order),
            tuple(_strides(t, order) for t in operands),
            tuple(_strides(t, [0])[0] if per_sample else 0 for t in operands), TENSORS=tensors, **constants,
        )  # fmt: skip


def random_init(
    out: Tensor, x: Tensor, noise: float, seed: int, lo: float = 0.0, hi: float = 1.0,
    noise_t: Tensor | None = None, seed_t: Tensor | None = None, lo_t: Tensor | None = None,
    hi_t: Tensor | None = None, **z: Tensor,
) -> None:  # fmt: skip
    params = [(0.0, None), (0.0, None), (noise, noise_t), (lo, lo_t), (hi, hi_t)]
    _launch(x, None, None, out, seed_tensor(seed, seed_t, x), params, (True, False, False, False), **z)


def fgsm_step(
    out: Tensor, x: Tensor, grad: Tensor, project: bool, alpha: float, eps: float, noise: float, seed: int,
    lo: float = 0.0, hi: float = 1.0,
    alpha_t: Tensor | None = None, eps_t: Tensor | None = None, noise_t: Tensor | None = None,
    seed_t: Tensor | None = None, lo_t: Tensor | None = None,
    hi_t: Tensor | None = None, **z: Tensor,
) -> None:  # fmt: skip
    has_noise = noise_t is not None or noise != 0
    seeds = seed_tensor(seed, seed_t, x) if has_noise else None
    params = [(alpha, alpha_t), (eps, eps_t), (noise, noise_t), (lo, lo_t), (hi, hi_t)]
    _launch(x, None, grad, out, seeds, params, (has_noise, True, False, project), **z)


def pgd_step(
    out: Tensor, x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float, lo: float = 0.0, hi: float = 1.0,
    alpha_t: Tensor | None = None, eps_t: Tensor | None = None, lo_t: Tensor | None = None,
    hi_t: Tensor | None = None, **z: Tensor,
) -> None:  # fmt: skip
    params = [(alpha, alpha_t), (eps, eps_t), (0.0, None), (lo, lo_t), (hi, hi_t)]
    _launch(x, x_adv, grad, out, None, params, (False, True, True, True), **z)


def _with_z(step: Callable[..., None]) -> Callable[..., None]:
    def run(out: Tensor, z: Tensor, mean: Tensor, scale: Tensor, *args: Any) -> None:
        step(out, *args, z=z, mean=mean, scale=scale)

    return run


def philox(out: Tensor, seed: Tensor, index: Tensor, restart: Tensor, word3: int) -> None:
    n = index.numel()
    with torch.cuda.device(index.device) if index.is_cuda else _HERE:
        philox_kernel[(triton.cdiv(max(n, 1), BLOCK),)](seed, index, restart, word3, out, n, BLOCK=BLOCK)


_STEPS: dict[str, Callable[..., None]] = {"random_init": random_init, "fgsm_step": fgsm_step, "pgd_step": pgd_step}
IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    **_STEPS,
    **{f"{name}_z": _with_z(step) for name, step in _STEPS.items()},
    "philox": philox,
}
