"""SORA's step: its length follows how well the linear model that FGSM trusts has held so far."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastadv.attacks import NFGSM, Attack
from fastadv.attacks.noise import uniform
from fastadv.attacks.samplewise import seeds_for
from fastadv.functional import random_init
from fastadv.training.fast.base import FastMethod, gradient_at


class SORA(FastMethod):
    """From x0 = P(x + U(-eps, eps)) a step of a_i sign g, with a_i ~ U(0, a*) for each number of a sample.

    The result is put into the box (P), and not into the ball. g' is the update's gradient at the result. v begins with
    .99 and follows, with a decay of .95, the mean over the samples of <sign g, g'> / |g|_1, in which samples with a
    zero gradient do not count. a* = min(2 eps, .02 / (1 - v)), and 2 eps where v is 1 or more. A monitor looks with
    N-FGSM's step of eps from the same start.

    From a summary of the paper's method, not checked against the paper.
    """

    sees_gradient = True
    REFUSES: Mapping[str, str] = {
        **FastMethod.REFUSES,
        "clean_weight": "its step follows the gradient of the loss at the attacked images",
    }

    def __init__(self, model: nn.Module, eps: float, **options: Any):
        super().__init__(model, eps, **options)
        self._v: torch.Tensor | None = None  # float64, 0-dim
        self._sum: Any = 0  # tensors after the first part of a batch
        self._count: Any = 0

    def looks(self, model: nn.Module, eps: float, **options: Any) -> Attack:
        return NFGSM(model, eps, noise=eps, **options)

    def begin(self, number: int, epoch: int, epochs: int) -> None:
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
        self._gradient = gradient_at(self.attack, start, labels)
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
        mean = self._sum / self._count
        if self._v is not None:
            self._v = torch.where(self._count > 0, 0.95 * self._v + 0.05 * mean, self._v)

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self._v is None else {"v": self._v}

    def load(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._v = state["v"].to(device) if state else None
