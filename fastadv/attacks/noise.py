"""Noise of other kinds from the ops' own generator, so that it has whole and per-sample seeds as theirs has."""

import torch

from fastadv.functional import random_init
from fastadv.ops.generator import as_int64


def uniform(like: torch.Tensor, seed: int | torch.Tensor) -> torch.Tensor:
    """Uniform in (0, 1), in like's shape and float dtype, float32 at least: the odd multiples of 2^-17."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return random_init(torch.full_like(like, 0.5, dtype=dtype), 0.5, seed=seed)


def gaussian(like: torch.Tensor, seed: int | torch.Tensor) -> torch.Tensor:
    """Standard normal, by the inverse of its distribution function; no value is beyond 4.4."""
    normal: torch.Tensor = torch.special.ndtri(uniform(like, seed))
    return normal


def uniform_per_sample(like: torch.Tensor, seed: int | torch.Tensor) -> torch.Tensor:
    """One number in (0, 1) for each row of `like`, independent of the other draws: (N,)."""
    other = ~(seed if isinstance(seed, torch.Tensor) else as_int64(seed))
    return uniform(like.new_empty(len(like), 1), other)[:, 0]
