"""The random numbers: seeds, and the generator by itself (contract.md, "Random bits")."""

import numbers
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fastadv.ops.backends import backend, run, serving


def new_seed(device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw a fresh seed from torch's generator on `device`.

    `torch.manual_seed` reproduces it, and a captured CUDA graph draws afresh at each replay.

    Args:
        device: where the seed lies.

    Returns:
        A 0-dim int64 tensor on `device`.
    """
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def _philox(seed: torch.Tensor, index: torch.Tensor, restart: torch.Tensor, word3: int) -> torch.Tensor:
    """The 4 words of every counter, the last dimension of an int64 tensor."""
    seed, index, restart = (t.contiguous() for t in torch.broadcast_tensors(seed, index, restart))
    out = torch.empty((*index.shape, 4), dtype=torch.int64, device=index.device)
    run("philox", serving(index.device), (out, seed, index, restart, word3))
    return out


def as_int64(value: int) -> int:
    """An int in [-2^63, 2^64) as the int64 with the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def _int64_tensor(name: str, value: object, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.int64 or value.device != device:
            raise TypeError(
                f"{name} must be an int or an int64 tensor on {device}, got {value.dtype} on {value.device}"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int or an int64 tensor, got {type(value).__name__}")
    if not -(2**63) <= (number := int(value)) < 2**64:
        raise ValueError(f"{name} must be in [-2^63, 2^64), got {value}")
    return torch.full((), as_int64(number), dtype=torch.int64, device=device)


def _one_or_each(name: str, value: object, index: torch.Tensor) -> torch.Tensor:
    """An int64 tensor that is 0-dim or has index's shape."""
    t = _int64_tensor(name, value, index.device)
    if t.dim() == 0 or t.shape == index.shape:
        return t
    if t.numel() != 1:
        raise ValueError(
            f"{name} must be an int, or have one element or index's shape {tuple(index.shape)}, "
            f"got shape {tuple(t.shape)}"
        )
    return t.reshape(())


def sample_seeds(seed: int | torch.Tensor, index: torch.Tensor, restart: int | torch.Tensor = 0) -> torch.Tensor:
    """Make one seed per sample, from the sample's number alone: its batch and its neighbours change nothing.

    A seed is word 0 | word 1 << 32 of Philox-4x32-10 with key = seed and counter = (index low, index high, restart, 1).

    Args:
        seed: an int in [-2^63, 2^64), or an int64 tensor on index's device, with one element or of shape (N,).
        index: int64 (N,), the samples' numbers in their data set.
        restart: an int in [0, 2^32), or an int64 tensor as for seed that is taken modulo 2^32: an evaluation's restart,
            a training's epoch.

    Returns:
        int64 (N,) on index's device.

    Raises:
        TypeError: an argument is of another type or dtype, or on another device.
        ValueError: an int is out of range, or a tensor has another shape.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    if not isinstance(index, torch.Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, torch.Tensor) else type(index).__name__
        raise TypeError(f"index must be an int64 tensor, got {got}")
    if index.dim() != 1:
        raise ValueError(f"index must have shape (N,), got {tuple(index.shape)}")
    if isinstance(restart, numbers.Integral) and not 0 <= restart < 2**32:
        raise ValueError(f"restart must be in [0, 2^32), got {restart}")
    words = _philox(_one_or_each("seed", seed, index), index, _one_or_each("restart", restart, index), 1)
    return words[..., 0] | (words[..., 1] << 32)


def philox_words(
    name: str, seed: int | torch.Tensor, first_group: int, n_groups: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Run a backend's generator by itself.

    Args:
        name: the backend.
        seed: an int in [-2^63, 2^64), or a 0-dim int64 tensor on `device`.
        first_group: number of the first group of 8 positions.
        n_groups: number of groups.
        device: where the words are made.

    Returns:
        int64 (n_groups, 4), the words of the groups from first_group on.
    """
    group = torch.arange(n_groups, dtype=torch.int64, device=device) + first_group
    with backend(name):
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return _philox(_int64_tensor("seed", seed, group.device), group, zero, 0)


def reseed(seed: int) -> None:
    """Seed the generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python inside, give them back as they were."""
    # NumPy's old one: it is what other libraries draw from.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    before = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices):
        reseed(seed)
        try:
            yield
        finally:
            np.random.set_state(before[0])  # noqa: NPY002
            random.setstate(before[1])
