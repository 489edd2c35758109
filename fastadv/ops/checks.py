"""What the public functions refuse, before anything is written. Every message names the argument and what it got."""

import math
import numbers
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fastadv.ops.generator import as_int64
from fastadv.ops.schemas import Arguments

Parameter = float | torch.Tensor
"""A step's parameter as it is given: a number, or a float tensor that broadcasts over the first two dimensions of x."""
Box = tuple[Parameter, Parameter]
Seed = int | torch.Tensor

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
IMAGES = FLOATS | {torch.uint8}

_FLOAT_NAMES = "float64, float32, float16 or bfloat16"


def image(name: str, t: object, dtypes: Collection[torch.dtype] = IMAGES) -> None:
    """A strided tensor of an image dtype."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        allowed = f"uint8, {_FLOAT_NAMES}" if torch.uint8 in dtypes else _FLOAT_NAMES
        raise TypeError(f"{name} must be {allowed}, got {t.dtype}")
    if t.layout is not torch.strided or t.is_nested:
        kind = "a nested one" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name} must be a strided (dense) tensor, got {kind}")


def _operand(name: str, t: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    image(name, t, FLOATS)
    if t.shape != like.shape:
        raise ValueError(f"{name} must have {like_name}'s shape {tuple(like.shape)}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} must be on {like_name}'s device {like.device}, got {t.device}")


# The images among a step's first arguments.
_IMAGE_NAMES: dict[str, tuple[str, ...]] = {
    "random_init": ("x",),
    "fgsm_step": ("x", "grad"),
    "pgd_step": ("x_adv", "grad", "x"),
}


def image_arguments(op_name: str, args: Arguments) -> dict[str, torch.Tensor]:
    """{name: tensor} of the images among an op's arguments."""
    return dict(zip(_IMAGE_NAMES[op_name], args, strict=False))


def images(op_name: str, args: Arguments, out: torch.Tensor | None, z: torch.Tensor | None = None) -> None:
    """The step's images, `out` and the model's input z: dtypes, shapes, devices, memory."""
    named = image_arguments(op_name, args)
    x = named["x"]
    image("x", x)
    for name, t in named.items():
        if t is not x:
            _operand(name, t, "x", x)
        elif name == "x_adv":
            image(name, t, FLOATS)
    if out is not None:
        _output("out", out, named, args)
    if z is not None:
        _output("z", z, named if out is None else {**named, "out": out}, (*args, out), may_be_input=False)


def no_tangents(op_name: str, args: Arguments, out: torch.Tensor | None, z: torch.Tensor | None) -> None:
    """Forward-mode AD: a tangent would be lost without a word."""
    names = {id(t): name for name, t in {**image_arguments(op_name, args), "out": out, "z": z}.items()}
    for t in (*args, out, z):
        if isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise RuntimeError(
                f"{names.get(id(t), 'a parameter')} has a forward-mode tangent, and a step has no forward-mode "
                "derivative: use reverse mode (torch.func.grad or vjp), or detach it"
            )


def _real(name: str, value: object, wanted: str = "a number or a tensor") -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:  # an int or a fraction
        raise ValueError(f"{name} must be a number that a float can hold, at most 1.8e308 in size") from None


def finite(name: str, value: object) -> float:
    """A number as a float."""
    number = _real(name, value, "a number")
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def _parameter_tensor(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    image("x", x)
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be a {_FLOAT_NAMES} tensor, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    if t.requires_grad:
        raise RuntimeError(f"{name} requires grad, and the step has no derivative with respect to it: detach it")
    if t.dim() == 0:
        return
    wanted = (*x.shape[:2], *(1,) * (x.dim() - 2))
    if t.dim() == 1 or t.dim() != x.dim() or any(s not in (1, w) for s, w in zip(t.shape, wanted, strict=True)):
        raise ValueError(
            f"{name} must be a number, 0-dim, or of x's rank and broadcast over its first two dimensions only, "
            f"such as (N, 1, 1, 1), (1, C, 1, 1) or (N, C, 1, 1); got shape {tuple(t.shape)} for x of "
            f"{tuple(x.shape)}"
        )


def _parameter(name: str, value: object, x: torch.Tensor) -> Parameter:
    """A parameter as a float or a tensor."""
    if isinstance(value, torch.Tensor):
        _parameter_tensor(name, value, x)
        return value
    number = _real(name, value)
    if number != number:
        raise ValueError(f"{name} must not be NaN")
    return number


def radius(name: str, value: Parameter, x: torch.Tensor, *, finite: bool = False) -> Parameter:
    """eps or noise, a float or a tensor: at least 0."""
    if type(value) is float and 0.0 <= value < math.inf:
        return value
    radius = _parameter(name, value, x)
    if isinstance(radius, torch.Tensor):
        return radius
    if radius < 0.0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    if finite and radius == math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return radius


def step_size(alpha: Parameter | None, eps: Parameter | None, x: torch.Tensor) -> Parameter:
    """alpha, a float or a tensor; eps where it is None."""
    size = eps if alpha is None else alpha
    if type(size) is float and -math.inf < size < math.inf:
        return size
    checked = _parameter("alpha", size, x)
    if not isinstance(checked, torch.Tensor) and abs(checked) == math.inf:
        got = "eps = inf: give a finite alpha" if alpha is None else alpha
        raise ValueError(f"alpha must be finite, got {got}")
    return checked


def box(clip: Box, x: torch.Tensor) -> Box:
    """clip = (lo, hi), floats or tensors."""
    try:
        lo, hi = clip
    except (TypeError, ValueError):
        raise TypeError(f"clip must be a pair (lo, hi), got {clip!r}") from None
    if type(lo) is float and type(hi) is float and lo <= hi:
        return lo, hi
    lo, hi = _parameter("clip[0]", lo, x), _parameter("clip[1]", hi, x)
    if not isinstance(lo, torch.Tensor) and not isinstance(hi, torch.Tensor) and lo > hi:
        raise ValueError(f"clip must be (lo, hi) with lo <= hi, got ({lo}, {hi})")
    return lo, hi


def seed(value: Seed, x: torch.Tensor) -> Seed:
    """A seed: an int64, or a tensor with one element or one per sample."""
    # A compiled function takes the long way for every int: a branch would be compiled for each side.
    if not is_compiling() and type(value) is int and 0 <= value < 2**63:
        return value
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"seed must be on x's device {x.device}, got {value.device}")
        if value.numel() != 1 and (x.dim() == 0 or value.shape != x.shape[:1]):
            raise ValueError(
                f"seed must have one element or shape (N,) with N = x.shape[0], got shape {tuple(value.shape)} "
                f"for x of {tuple(x.shape)}"
            )
        return value.contiguous()
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(value).__name__}")
    if not -(2**63) <= (number := int(value)) < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64), got {value}")
    return as_int64(number)


# ---------------------------------------------------------------- out=


def _overlaps_itself(t: torch.Tensor) -> bool:
    """Whether two elements of t may share memory, by its strides; True where in doubt."""
    extent = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride < extent:
            return True
        extent = stride * (size - 1) + extent
    return False


def _has_memory(t: torch.Tensor) -> bool:
    """Whether t has elements in memory: a meta or fake tensor has none, nor has a wrapper of torch.func around one."""
    return t.numel() > 0 and not is_fake(t) and torch._C._has_storage(t) and t.data_ptr() != 0


class _Memory:
    """A tensor's addresses for a NumPy array that nothing reads: NumPy decides exactly whether two arrays overlap."""

    def __init__(self, t: torch.Tensor) -> None:
        size = t.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (t.data_ptr(), True),
            "typestr": f"|V{size}",
            "shape": tuple(t.shape),
            "strides": tuple(s * size for s in t.stride()),
        }


def _array(t: torch.Tensor) -> np.ndarray:
    return np.asarray(_Memory(t))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    )


def _output(
    name: str, out: torch.Tensor, named: Mapping[str, torch.Tensor], args: Iterable[object], may_be_input: bool = True
) -> None:
    """`out` may be an input to the letter (same memory, dtype and strides); any other overlap is refused."""
    like_name, like = next(iter(named.items()))
    _operand(name, out, like_name, like)
    if is_compiling():
        return  # functionalisation gives every mutated tensor memory of its own
    if not _has_memory(out):
        return
    if _overlaps_itself(out):
        raise ValueError(f"{name} has elements that share memory (strides {out.stride()}): give it memory of its own")
    names = {id(t): name for name, t in named.items()}
    for t in args:
        if not isinstance(t, torch.Tensor) or not _has_memory(t) or (may_be_input and _same(out, t)):
            continue
        if np.shares_memory(_array(out), _array(t)):
            other = names.get(id(t), "a parameter or the seed")
            but = " without being the same tensor" if may_be_input else ""
            raise ValueError(f"{name} overlaps {other} in memory{but}: give it memory of its own")


def needs_a_copy(args: Arguments, out: torch.Tensor | None, z: torch.Tensor | None) -> bool:
    """Whether a result is memory that the kernels refuse and PyTorch's `copy_` writes.

    It alternates with another tensor, as two channels of one buffer do, and shares no element with it; or it is a view
    that negates its memory, such as the imaginary part of a conjugate.
    """
    results = [t for t in (out, z) if t is not None and _has_memory(t)]
    tensors = [t for t in (*args, *results) if isinstance(t, torch.Tensor) and _has_memory(t)]
    return any(result.is_neg() for result in results) or any(
        not _same(result, t) and np.may_share_memory(_array(result), _array(t)) for result in results for t in tensors
    )
