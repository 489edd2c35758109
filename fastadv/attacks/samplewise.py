"""Values that are one for all samples, or have a row for each: numbers, seeds, tensors."""

from typing import Any, TypeGuard

import torch

from fastadv.functional import sample_seeds

AT_ONCE = ("cpu",)  # types of devices whose host has values without waiting


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N,) as (N, 1, ...), to go with `like`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def put_(kept: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Write the rows of `values` into `kept` where `rows`, (N,) bool, says so; both are finite and of one dtype.

    lerp is exact at 0 and 1, and on the CPU five times as fast as torch.where.
    """
    if any_of(rows):
        kept.lerp_(values, per_sample(rows, kept).to(kept.dtype))


def any_of(rows: torch.Tensor) -> bool:
    """Whether one of `rows`, (N,) bool, is set; True on a device whose host would have to wait for the answer."""
    return rows.device.type not in AT_ONCE or bool(rows.any())


def largest(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in the last dimension, without memory for all magnitudes."""
    return torch.maximum(values.amax(-1), -values.amin(-1))


def scalar(seed: int | torch.Tensor | None) -> int | torch.Tensor | None:
    """A seed of one element as one without dimensions, an integer of NumPy's as Python's; others as they are."""
    if isinstance(seed, torch.Tensor):
        return seed.reshape(()) if seed.numel() == 1 else seed
    return seed if seed is None else int(seed)


def seeds_for(seed: int | torch.Tensor, x: torch.Tensor, restart: int | torch.Tensor = 0) -> torch.Tensor:
    """One seed for each of `x`; from seeds that are one per sample already, the sample's number adds nothing."""
    rows = isinstance(seed, torch.Tensor) and seed.numel() != 1
    make: Any = torch.zeros if rows else torch.arange
    return sample_seeds(seed, make(len(x), dtype=torch.int64, device=x.device), restart)


def has_rows(value: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor with a row for each sample. A single row serves all samples, and does not count."""
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) > 1


def part_of(value: Any, part: slice) -> Any:
    """The rows `part` (a slice), where there are rows."""
    return value[part] if has_rows(value) else value


def padded(value: Any, n: int, pad: int) -> Any:
    """A value of n rows with its last row `pad` times more; any other as it is."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != n:
        return value
    return together(value, value[-1:].expand(pad, *value.shape[1:]))


def together(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The rows of both, laid out as the first."""
    return _laid_out(torch.cat((first, second)), first)


def taken(value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows `index`, laid out as all of them."""
    return _laid_out(value.index_select(0, index), value)


def _laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # Neither cat nor index_select keeps it, and noise follows the layout.
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if like.ndim == ndim and like.is_contiguous(memory_format=layout):
            return value.contiguous(memory_format=layout)
    return value


def cosines_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The cosine of the angle between the rows of a and b, float64 (N,); NaN where one is zero."""
    a, b = (rows.flatten(1).double() for rows in (a, b))  # a confident model's are too small to be squared in float32
    lengths: torch.Tensor = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(1) / lengths
