"""The single-step attacks."""

from collections.abc import Callable

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.gradient import InputGradient
from fastadv.functional import fgsm_step, new_seed, random_init


class FGSM(Attack):
    """One step along the sign of the gradient; with `noise`, from a random start (FGSM-RS).

    `FGSM(model, eps)` is Goodfellow et al. 2015 (arXiv 1412.6572, section 4);
    `FGSM(model, eps, alpha=1.25 * eps, noise=eps)` is Wong et al. 2020 (arXiv 2001.03994, algorithm 3).

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball around the image, in pixels of [0, 1].
        alpha: step size in the same unit; None means eps.
        noise: half-width of the uniform random start, in the same unit.
    """

    project = True

    def __init__(self, model: Callable, eps: float, *, alpha: float | None = None, noise: float = 0.0):
        super().__init__(model, eps)
        self.alpha = eps if alpha is None else alpha
        self.noise = noise

    def perturb(self, images: torch.Tensor, gradient: InputGradient, seed: int | torch.Tensor | None) -> torch.Tensor:
        if self.noise and seed is None:
            seed = new_seed(images.device)
        start = images
        if self.noise or images.dtype == torch.uint8:  # without noise, random_init only converts
            start = random_init(images, self.noise, seed=seed if self.noise else 0)
        # The step makes the same start again from the seed instead of loading it.
        return fgsm_step(
            images,
            gradient(start),
            self.eps,
            alpha=self.alpha,
            noise=self.noise,
            seed=seed,
            project=self.project,
        )


class NFGSM(FGSM):
    """FGSM from a wide random start, not projected back on the ball.

    de Jorge et al. 2022 (arXiv 2202.01181, section 4). A training attack: with the default noise the result
    is up to 3 eps from the image.

    Args:
        model: any callable from images to logits (N, C).
        eps: the budget, in pixels of [0, 1].
        noise: half-width of the uniform random start, in the same unit; None means 2 eps.
        alpha: step size in the same unit; None means eps.
    """

    project = False

    def __init__(self, model: Callable, eps: float, *, noise: float | None = None, alpha: float | None = None):
        super().__init__(model, eps, alpha=alpha, noise=2 * eps if noise is None else noise)
