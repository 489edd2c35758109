"""ZeroGrad: a single step that leaves the pixels with the smallest gradients where they are."""

import math
from typing import Any

import torch

from fastadv.attacks.checks import check_number
from fastadv.attacks.engine import Slots
from fastadv.attacks.fgsm import FGSM
from fastadv.attacks.samplewise import per_sample
from fastadv.nn.logits import AnyModel


class ZeroGrad(FGSM):
    """FGSM from a random start, where a sample's gradients below a quantile of their magnitudes count as zero.

    Golgooni et al. 2021 (arXiv 2103.15476): the small ones change their signs from epoch to epoch, and
    FGSM trusts them as it does the large ones. The start is in the box.

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball and half-width of the random start, in the images' units, [0, 1].
        alpha: step size in the same unit; None means 2 eps.
        quantile: share in [0, 1] of each sample's gradients; those strictly below its value are zeroed: .35 is for
            CIFAR-10, .45 for CIFAR-100, .7 for SVHN.
        options: see `Attack`.

    Raises:
        TypeError: quantile is no number.
        ValueError: quantile is not in [0, 1].
    """

    def __init__(
        self,
        model: AnyModel,
        eps: float = 8 / 255,
        *,
        alpha: float | torch.Tensor | None = None,
        quantile: float = 0.35,
        **options: Any,
    ) -> None:
        self.quantile = quantile
        super().__init__(model, eps, alpha=alpha, **{"noise": None, **options})

    def check(self) -> None:
        super().check()
        check_number("quantile", self.quantile)
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile is a share in [0, 1], got {self.quantile}")

    def step_size(self, slots: Slots) -> float | torch.Tensor:
        return 2 * slots.eps if self.alpha is None else super().step_size(slots)

    def step(self, slots: Slots, grad: torch.Tensor) -> None:
        grad = self.in_pixels(grad)
        sizes = grad.abs().flatten(1)
        # Of the two values that a quantile lies between, strictly below it and strictly below the larger are one.
        rank = 1 + math.ceil(self.quantile * (sizes.shape[1] - 1))
        least = sizes.kthvalue(rank, dim=1).values
        super().step(slots, grad.masked_fill(grad.abs() < per_sample(least, grad), 0.0))
