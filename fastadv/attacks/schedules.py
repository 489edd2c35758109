"""How long each step of an attack is, as a factor of its step size."""

import math
from collections.abc import Callable, Sequence

import torch

SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, steps: 1.0,
    "cosine": lambda step, steps: 1 + math.cos(math.pi * step / steps),  # from 2 down to nearly 0
}


class Factors:
    """The factors of an attack's steps, kept on the device that they were last asked for."""

    def __init__(self, factors: Sequence[float] | Sequence[tuple[float, ...]]) -> None:
        self._factors = torch.tensor(factors, dtype=torch.float64)

    def __call__(self, ages: torch.Tensor) -> torch.Tensor:
        """The factors of the steps that follow after `ages` steps, int64 (N,): float64 (N, ...)."""
        if self._factors.device != ages.device:
            self._factors = self._factors.to(ages.device)
        return self._factors.index_select(0, ages.clamp(max=len(self._factors) - 1))
