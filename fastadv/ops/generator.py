"""The random numbers: seeds, and the generator by itself (contract.md, "Random bits")."""

import numbers
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fastadv.ops.backends import backend, run, serving


def new_seed(device="cpu"):
    """A fresh seed: a 0-dim int64 tensor on `device`, drawn from torch's generator there.

    `torch.manual_seed` reproduces it, and a captured CUDA graph draws afresh at each replay.
    """
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def _philox(seed, index, restart, word3):
    seed, index, restart = (t.contiguous() for t in torch.broadcast_tensors(seed, index, restart))
    out = torch.empty((*index.shape, 4), dtype=torch.int64, device=index.device)
    run("philox", serving(index.device), (out, seed, index, restart, word3))
    return out


def as_int64(value):
    """An int in [-2^63, 2^64) as the int64 with the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def _int64_tensor(name, value, device):
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.int64 or value.device != device:
            raise TypeError(
                f"{name} must be an int or an int64 tensor on {device}, got {value.dtype} on {value.device}"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int or an int64 tensor, got {type(value).__name__}")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must be in [-2^63, 2^64), got {value}")
    return torch.full((), as_int64(int(value)), dtype=torch.int64, device=device)


def sample_seeds(seed, index, restart=0):
    """One seed per sample, from the sample's number alone, so whatever its batch and neighbours.

    seed: int in [-2^63, 2^64) or 0-dim int64 tensor; index: int64 [N], the samples' numbers in their data set;
    restart: int in [0, 2^32), or int64 [N] taken modulo 2^32 (an evaluation's restart, a training's epoch).
    Returns int64 [N] on index's device: word 0 | word 1 << 32 of Philox-4x32-10 (Salmon et al., 2011) with
    key = seed and counter = (index low, index high, restart, 1).

    Raises:
        TypeError: an argument of another type, dtype or device. ValueError: an int out of range.
    """
    if not isinstance(index, torch.Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, torch.Tensor) else type(index).__name__
        raise TypeError(f"index must be an int64 tensor, got {got}")
    if index.dim() != 1:
        raise ValueError(f"index must have shape (N,), got {tuple(index.shape)}")
    if isinstance(restart, numbers.Integral) and not 0 <= restart < 2**32:
        raise ValueError(f"restart must be in [0, 2^32), got {restart}")
    seed = _int64_tensor("seed", seed, index.device)
    words = _philox(seed, index, _int64_tensor("restart", restart, index.device), 1)
    return words[..., 0] | (words[..., 1] << 32)


def philox_words(name, seed, first_group, n_groups, device="cpu"):
    """The named backend's generator by itself: int64 [n_groups, 4], the words of the groups first_group, ..."""
    group = torch.arange(n_groups, dtype=torch.int64, device=device) + first_group
    with backend(name):
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return _philox(_int64_tensor("seed", seed, group.device), group, zero, 0)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python inside, give them back as they were."""
    # NumPy's old one: it is what other libraries draw from.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    before = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before[0])  # noqa: NPY002
            random.setstate(before[1])
