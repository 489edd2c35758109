"""The iterated attack."""

from collections.abc import Callable

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.gradient import InputGradient
from fastadv.functional import pgd_step_, random_init


class PGD(Attack):
    """Projected gradient descent on the L-inf ball: Madry et al. 2018 (arXiv 1706.06083, section 2.1).

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball around the image, in pixels of [0, 1].
        alpha: step size in the same unit.
        steps: number of steps, at least 1.
        random_start: start at a uniformly random point of the ball, else at the image.

    Raises:
        ValueError: eps is not in [0, 1], or steps is below 1.
    """

    def __init__(self, model: Callable, eps: float, alpha: float, steps: int, *, random_start: bool = True):
        super().__init__(model, eps)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start

    def perturb(self, images: torch.Tensor, gradient: InputGradient, seed: int | torch.Tensor | None) -> torch.Tensor:
        # Without noise random_init is an exact copy (or conversion of uint8); it then needs no draw.
        noise, seed = (self.eps, seed) if self.random_start else (0.0, 0)
        adv = random_init(images, noise, seed=seed)
        for _ in range(self.steps):
            pgd_step_(adv, gradient(adv), images, alpha=self.alpha, eps=self.eps)
        return adv
