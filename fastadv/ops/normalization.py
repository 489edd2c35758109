"""What a model does to an image first: subtract its mean, divide by its standard deviation, channel by channel."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch._C import _len_torch_dispatch_stack
from torch._guards import active_fake_mode
from torch.compiler import is_compiling

from fastadv.ops import checks
from fastadv.ops.reference import compute_dtype, normalized

Numbers = float | tuple[float, ...]


def _numbers(name: str, value: float | Iterable[float]) -> Numbers:
    """A float, or a tuple of one per channel."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if sum(size != 1 for size in value.shape) > 1:
            raise ValueError(f"{name} must be a number or one per channel, got shape {tuple(value.shape)}")
        value = value.flatten().tolist() if value.ndim else value.item()
    if isinstance(value, (Set, Mapping)):  # {0.4, 0.5} forgets which came first
        raise TypeError(f"{name} must be a number or one per channel, in their order, got a {type(value).__name__}")
    if not isinstance(value, Iterable):
        return checks.finite(name, value)
    values = tuple(value)
    if not values:
        raise ValueError(f"{name} must be a number or one per channel, got none")
    return tuple(checks.finite(f"{name}[{i}]", v) for i, v in enumerate(values))


class Normalization:
    """z = (w - mean) * (1 / std): the model's input z for an image w.

    A step that is given a Normalization and a tensor z writes z in the same pass. Calling it on an image gives the same
    bits by plain PyTorch (contract.md, "Model input").

    Args:
        mean: a finite number for all channels, or one per channel: a list, an array, or a tensor such as (C, 1, 1).
        std: likewise, above 0.

    Raises:
        TypeError: something is no number.
        ValueError: a number is out of range, or mean and std are sequences of different lengths.
    """

    def __init__(self, mean: float | Iterable[float], std: float | Iterable[float]) -> None:
        self._mean, self._std = _numbers("mean", mean), _numbers("std", std)
        lengths = [len(v) for v in (self.mean, self.std) if isinstance(v, tuple)]
        if len(set(lengths)) > 1:
            raise ValueError(f"mean and std must have one number per channel, got {lengths[0]} and {lengths[1]}")
        for s in self.std if isinstance(self.std, tuple) else (self.std,):
            if s <= 0:
                raise ValueError(f"std must be above 0, got {self.std}")
        self.channels = max(lengths, default=None)  # None: any
        self._made: dict[tuple[int, torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    # Read-only: the tensors that were made of them are kept.
    @property
    def mean(self) -> Numbers:
        return self._mean

    @property
    def std(self) -> Numbers:
        return self._std

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}  # a loader may move tensors to another device than their key says

    def __repr__(self) -> str:
        return f"Normalization(mean={self.mean}, std={self.std})"

    def check(self, x: torch.Tensor) -> None:
        """Refuse an image with other channels.

        Raises:
            ValueError: x is not (N, channels, ...).
        """
        if self.channels is not None and (x.dim() < 2 or x.shape[1] != self.channels):
            raise ValueError(f"normalization has {self.channels} channels, got an image of shape {tuple(x.shape)}")

    def parameters(self, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Make (mean, 1/std), each rounded once to dtype.

        They are kept: making one copies from the host, which a CUDA graph cannot capture.

        Args:
            dim: the image's number of dimensions.
            dtype: the compute type.
            device: the image's.

        Returns:
            Two tensors (1, C, 1, ...) with `dim` dimensions, 0-dim where both are one number.
        """
        traced = is_compiling() or torch._C._is_tracing()
        if traced or (_len_torch_dispatch_stack() and active_fake_mode() is not None):
            # Here a tensor is a symbol, a part of a trace or has no numbers: it must not be kept.
            return self._make(dim, dtype, device)
        key = dim, dtype, device
        if key not in self._made:
            # Every later call uses them: they must be neither inference tensors nor tensors of a functorch transform.
            with torch.inference_mode(False), torch._C._DisableFuncTorch():
                self._made[key] = self._make(dim, dtype, device)
        return self._made[key]

    def _make(self, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        n = 1 if self.channels is None else self.channels
        means, stds = (v if isinstance(v, tuple) else (v,) * n for v in (self.mean, self.std))
        shape = () if self.channels is None else (1, -1, *(1,) * (dim - 2))
        mean, scale = (torch.tensor(v, dtype=dtype, device=device) for v in (means, [1.0 / s for s in stds]))
        return mean.view(shape), scale.view(shape)

    def __call__(self, w: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Compute the model's input z.

        The arithmetic is float64 for a float64 image, else float32. A step computes in float64 where its clean image is
        float64, whatever its result: pass `w.double()` there.

        Args:
            w: float images (N, C, ...).
            dtype: of z, a float dtype; None: w's own.

        Returns:
            z, like w.

        Raises:
            TypeError: w is no float image, or dtype is no float dtype.
            ValueError: w has other channels.
        """
        checks.image("w", w, checks.FLOATS)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a float dtype such as torch.float16, got {dtype!r}")
        self.check(w)
        mean, scale = self.parameters(w.dim(), compute_dtype(w), w.device)
        return normalized(w, mean, scale, w.dtype if dtype is None else dtype)
