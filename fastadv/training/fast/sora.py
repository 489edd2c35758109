"""SORA: FGSM-RS with a shorter step where the loss has been less linear."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastadv.attacks import NFGSM, Attack
from fastadv.attacks.noise import uniform
from fastadv.attacks.samplewise import seeds_for
from fastadv.functional import random_init
from fastadv.training.fast.base import FastMethod


class SORA(FastMethod):
    """A step from a random start, whose length depends on how linear the loss was in earlier updates.

        start       x0 = P(x + U(-eps, eps)), with the gradient g
        result      P(x0 + a sign g), with a drawn from U(0, a*) for each number of a sample

    P clamps to [0, 1]. The result is not projected into the ball. g' is the update's gradient at the result. v measures
    how linear the loss is: it begins with 0.99 and follows, with a decay of 0.95, the mean over the samples of
    <sign g, g'> / |g|_1, without samples whose gradient g is zero. For a linear loss g' = g, and the quotient is 1. The
    longest step is a* = min(2 eps, 0.02 / (1 - v)), and 2 eps where v is 1 or more.

    The monitor uses N-FGSM's step of eps from the same start.

    This follows a summary of the paper's method and was not checked against the paper.
    """

    sees_gradient = True

    def __init__(self, model: nn.Module, eps: float, **options: Any):
        super().__init__(model, eps, **options)
        self._v: torch.Tensor | None = None  # float64, 0-dim
        self._sum: Any = 0  # this and the count are tensors after the first part of a batch
        self._count: Any = 0

    def looks(self, model: nn.Module, eps: float, **options: Any) -> Attack:
        return NFGSM(model, eps, noise=eps, **options)

    def check_loss(self, name: str, clean_weight: float, label_smoothing: float) -> None:
        super().check_loss(name, clean_weight, label_smoothing)
        if clean_weight:
            raise ValueError(
                f"clean_weight is not for {name}: its step follows the gradient of the loss at the attacked images. "
                "Leave it out"
            )

    def begin(self, number: int, epoch: int, epochs: int) -> None:
        super().begin(number, epoch, epochs)
        self._sum = self._count = 0

    def attacked(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
        moves: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        if self._v is None:
            self._v = torch.full((), 0.99, dtype=torch.float64, device=images.device)
        start = random_init(images, self.eps, seed=seeds)
        self._gradient = self.gradient_at(start, labels)
        left = 1 - self._v
        longest = torch.where(left > 0, 0.02 / left, torch.inf).clamp(max=2 * self.eps).to(images.dtype)
        length = longest * uniform(images, seeds_for(seeds, images, 1)).to(images.dtype)
        return ((start + length * self._gradient.sign().to(images.dtype)).clamp(0, 1),)

    def seen(self, gradient: torch.Tensor) -> None:
        before, after = (g.flatten(1).double() for g in (self._gradient, gradient))
        length = before.abs().sum(1)
        held = (before.sign() * after).sum(1) / length
        self._sum = self._sum + torch.where(length > 0, held, 0.0).sum()
        self._count = self._count + (length > 0).sum()

    def end(self) -> None:
        super().end()
        if self._v is not None and isinstance(self._count, torch.Tensor):  # else the update had no gradient
            mean = self._sum / self._count
            self._v = torch.where(self._count > 0, 0.95 * self._v + 0.05 * mean, self._v)

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self._v is None else {"v": self._v}

    def load(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._v = state["v"].to(device) if state else None
