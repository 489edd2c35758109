"""Free adversarial training: a single backward pass updates the weights and the perturbation."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastadv.training.fast.base import FastMethod


class Free(FastMethod):
    """Each batch trains several times in a row, at images + delta, and the update's own gradient moves delta.

    After each update with the gradient g of the pixels, delta <- delta + eps sign g, clamped to [-eps, eps]. delta
    begins with zeros, and the next batch continues with the last batch's delta.

    An epoch has as many updates as with any other attack. So it costs as much as an epoch of standard training, but is
    only a part of a pass over the images: with 8 repeats, 8 epochs are one pass. The paper has 8 repeats for CIFAR-10
    and 4 for ImageNet.

    Source: Shafahi et al. 2019 (arXiv 1904.12843, algorithm 1).
    """

    OPTIONS = ("repeats",)
    REPEATS = 8
    sees_gradient = True

    def __init__(self, model: nn.Module, eps: float, **options: Any):
        super().__init__(model, eps, **options)
        self._delta: torch.Tensor | None = None  # (rows of a batch, ...)
        self._first = 0

    def begin(self, number: int, epoch: int, epochs: int) -> None:
        super().begin(number, epoch, epochs)
        self._first = 0  # the first row of the batch in the next part

    def attacked(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
        moves: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        part = slice(self._first, self._first + len(images))
        if self._delta is None:
            self._delta = torch.zeros_like(images)
        elif part.stop > len(self._delta):
            more = self._delta.new_zeros(part.stop - len(self._delta), *images.shape[1:])
            self._delta = torch.cat((self._delta, more))
        self._first, self._part = part.stop, self._delta[part]
        return ((images + self._part).clamp(0, 1),)

    def seen(self, gradient: torch.Tensor) -> None:
        self._part.add_(gradient.sign(), alpha=self.eps).clamp_(-self.eps, self.eps)

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self._delta is None else {"delta": self._delta}

    def load(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._delta = state["delta"].to(device) if state else None
