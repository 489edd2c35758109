"""What a run attacks: images, what goes with each of them, and their parts."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fastadv.attacks.samplewise import padded, part_of, seeds_for


@dataclass(frozen=True)
class Inputs:
    """Images (N, ...) and what goes with them: one for all, or a row for each.

    Attributes:
        x: the clean images.
        targets: what the loss compares with.
        eps: the budget.
        seed: of what is drawn; None where nothing is.
        x_init: images to start from; None for the attack's own start.
        alpha: step sizes (N, 1, ...); None where they are one for all.
    """

    x: torch.Tensor
    targets: torch.Tensor
    eps: float | torch.Tensor
    seed: int | torch.Tensor | None
    x_init: torch.Tensor | None
    alpha: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.x)

    def parts(self, size: int) -> list["Inputs"]:
        """The images `size` at a time. One seed for all becomes one for each, so that no two parts draw the same."""
        whole = self
        if self.seed is not None and not (isinstance(self.seed, torch.Tensor) and self.seed.ndim):
            whole = replace(self, seed=seeds_for(self.seed, self.x))
        rows = [slice(first, first + size) for first in range(0, len(self), size)]
        return [Inputs(*(part_of(each, part) for each in whole._values)) for part in rows]

    def filled_up(self, pad: int) -> "Inputs":
        """With the last image `pad` times more."""
        return Inputs(*(padded(each, len(self), pad) for each in self._values))

    def of_run(self, run: int) -> "Inputs":
        """Those of a restart, which has its own start and draws: run 0 has these."""
        if run == 0:
            return self
        return replace(self, seed=None if self.seed is None else seeds_for(self.seed, self.x, run), x_init=None)

    @property
    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, each.name) for each in fields(self))
