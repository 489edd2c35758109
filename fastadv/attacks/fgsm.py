"""The single-step attacks."""

from typing import Any

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.checks import check_alpha, check_length, check_number
from fastadv.attacks.engine import Slots
from fastadv.functional import fgsm_step, pgd_step_, random_init
from fastadv.nn.logits import AnyModel


class FGSM(Attack):
    """One step along the sign of the gradient; with `noise`, from a random start (FGSM-RS).

    Goodfellow et al. 2015 (arXiv 1412.6572, section 4).

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball around the image, in the images' units, [0, 1].
        alpha: step size in the same unit; None means eps; also a tensor, see `Attack.alpha`.
        noise: half-width of the uniform random start, in the same unit; None means eps, also where that has one value
            per image.
        options: see `Attack`.
    """

    project = True
    NOISE = 1  # times eps, where noise is None

    def __init__(
        self,
        model: AnyModel,
        eps: float = 8 / 255,
        *,
        alpha: float | torch.Tensor | None = None,
        noise: float | None = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, **options)
        self.alpha = alpha
        self.noise = noise
        self.check()
        self._warn_of_step()

    @property
    def draws(self) -> bool:
        return self.noise is None or self.noise > 0  # None follows the eps of the call

    def check(self) -> None:
        super().check()
        if self.alpha is not None:
            check_alpha(self.alpha)
            check_length("alpha", self.alpha, self.eps, self.norm, self.clip)
        if self.noise is not None:
            check_number("noise", self.noise)
            if self.noise < 0:
                raise ValueError(f"noise must not be negative, got {self.noise}")
            check_length("noise", self.noise, self.eps, self.norm, self.clip)

    def _noise(self, eps: float | torch.Tensor) -> float | torch.Tensor:
        return self.noise if self.noise is not None else self.NOISE * eps

    def short_of(self, eps: object) -> str | None:
        return super().short_of(eps) if self.project else None  # else the start alone may leave the ball

    def start(self, slots: Slots) -> None:
        # Without noise random_init only converts, and a float image that the model takes unchanged needs none of it.
        if self.draws or slots.x.dtype == torch.uint8 or slots.adv is not None or slots.z is not None:
            seed = slots.seed if self.draws else 0
            slots.adv = random_init(
                slots.x, self._noise(slots.eps), seed=seed, out=slots.adv, **self.model_input_kwargs(slots)
            )

    def step(self, slots: Slots, grad: torch.Tensor) -> None:
        alpha = self.step_size(slots)
        if slots.given and self.project:
            pgd_step_(slots.adv, grad, slots.x, alpha=alpha, eps=slots.eps, **self.model_input_kwargs(slots))
            return
        # The step makes the same start again from the seed instead of loading it; a start that was given has no seed.
        x, noise = (slots.adv, 0.0) if slots.given else (slots.x, self._noise(slots.eps))
        slots.adv = fgsm_step(
            x,
            grad,
            slots.eps,
            alpha=alpha,
            noise=noise,
            seed=slots.seed if self.draws else None,
            project=self.project,
            out=slots.adv,
            **self.model_input_kwargs(slots),
        )


class FFGSM(FGSM):
    """FGSM from a random start (FGSM-RS), by torchattacks' name and defaults.

    Wong et al. 2020 (arXiv 2001.03994, algorithm 3).

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball and half-width of the random start, in the images' units, [0, 1].
        alpha: step size in the same unit.
        options: see `Attack`.
    """

    def __init__(self, model: AnyModel, eps: float = 8 / 255, alpha: float = 10 / 255, **options: Any) -> None:
        super().__init__(model, eps, alpha=alpha, **{"noise": None, **options})


class NFGSM(FGSM):
    """FGSM from a wide random start, not projected back on the ball.

    de Jorge et al. 2022 (arXiv 2202.01181, section 4). A training attack: with the default noise the result
    is up to 3 eps from the image, and from an `x_init` it is alpha from that, wherever that is.

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball, in the images' units, [0, 1].
        noise: half-width of the uniform random start, in the same unit; None means 2 eps.
        alpha: step size in the same unit; None means eps.
        options: see `Attack`.
    """

    project = False
    NOISE = 2

    def __init__(
        self,
        model: AnyModel,
        eps: float = 8 / 255,
        *,
        noise: float | None = None,
        alpha: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, alpha=alpha, noise=noise, **options)
