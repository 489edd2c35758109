"""The iterated L-inf attacks."""

from typing import Any

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.checks import box_of, check_alpha, check_length, check_number, check_switch, check_whole
from fastadv.attacks.engine import Slots
from fastadv.attacks.noise import gaussian
from fastadv.attacks.samplewise import per_sample
from fastadv.attacks.schedules import SCHEDULES, Factors
from fastadv.functional import pgd_step, pgd_step_, random_init
from fastadv.names import instead
from fastadv.nn.logits import AnyModel


class PGD(Attack):
    """Projected gradient descent on the L-inf ball: Madry et al. 2018 (arXiv 1706.06083, section 2.1).

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball around the image, in the images' units, [0, 1].
        alpha: step size in the same unit; None means eps; also a tensor, see `Attack.alpha`.
        steps: number of steps, at least 1.
        random_start: start at a uniformly random point of the ball, else at the image.
        schedule: of the step size: "constant", or "cosine", from 2 alpha down to nearly 0 by half a cosine.
        options: see `Attack`.

    Steps that together are shorter than eps are warned of, such as 10 of 2/255 where eps is 48/255: from the image they
    do not reach the ball's boundary. alpha=0 is meant, and is the start alone.

    Raises:
        ValueError: eps is not in [0, 1], steps is below 1, or there is no such schedule.
    """

    steps: int

    def __init__(
        self,
        model: AnyModel,
        eps: float = 8 / 255,
        alpha: float | torch.Tensor | None = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        schedule: str = "constant",
        **options: Any,
    ) -> None:
        super().__init__(model, eps, **options)
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.schedule = schedule
        self._factors: tuple[list[float], Factors] | None = None
        self.check()
        self._warn_of_step()

    @property
    def draws(self) -> bool:
        return self.random_start

    def check(self) -> None:
        super().check()
        check_switch("random_start", self.random_start)
        check_whole("steps", self.steps)
        if self.alpha is not None:
            check_alpha(self.alpha)
            check_length("alpha", self.alpha, self.eps, self.norm, self.clip)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}{instead(self.schedule, SCHEDULES)}")

    @property
    def by_age(self) -> bool:
        return self.schedule != "constant"

    def factors(self) -> list[float]:
        return [SCHEDULES[self.schedule](step, self.steps) for step in range(self.steps)]

    def factor_of(self, slots: Slots) -> torch.Tensor:
        """The number of the factor that the next step takes, int64 (N,)."""
        return slots.age

    def length(self, slots: Slots) -> float | torch.Tensor:
        """The length of the next step: one for all, or (N, 1, ...)."""
        alpha = self.step_size(slots)
        if not self.by_age:
            return alpha
        factors = self.factors()
        if self._factors is None or self._factors[0] != factors:
            self._factors = factors, Factors(factors)
        return alpha * per_sample(self._factors[1](self.factor_of(slots)), slots.x)

    def start(self, slots: Slots) -> None:
        # Without noise random_init is an exact copy (or conversion of uint8); it then needs no draw.
        noise, seed = (slots.eps, slots.seed) if self.random_start else (0.0, 0)
        slots.adv = random_init(slots.x, noise, seed=seed, out=slots.adv, **self.model_input_kwargs(slots))

    def step(self, slots: Slots, grad: torch.Tensor) -> None:
        pgd_step_(slots.adv, grad, slots.x, alpha=self.length(slots), eps=slots.eps, **self.model_input_kwargs(slots))


class BIM(PGD):
    """The basic iterative method, PGD from the image itself: Kurakin et al. 2017 (arXiv 1607.02533, section 2.2).

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball around the image, in the images' units, [0, 1].
        alpha: step size in the same unit; None means eps.
        steps: number of steps, at least 1.
        options: as PGD's, `schedule` among them; see `Attack`.
    """

    def __init__(
        self, model: AnyModel, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, **options: Any
    ) -> None:
        super().__init__(model, eps, alpha, steps, **{"random_start": False, **options})


class TPGD(PGD):
    """The attack of TRADES: PGD on the divergence from the model's output on the clean image.

    Zhang et al. 2019 (arXiv 1901.08573, section 5). Labels are not needed: `atk(images)`.

    The start is the image plus Gaussian noise of deviation 0.001.

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball around the image, in the images' units, [0, 1].
        alpha: step size in the same unit; None means eps.
        steps: number of steps, at least 1.
        options: as PGD's, `schedule` among them; see `Attack`.
    """

    START = 0.001

    def __init__(
        self, model: AnyModel, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, **options: Any
    ) -> None:
        super().__init__(model, eps, alpha, steps, **{"loss": "kl", **options})

    def start(self, slots: Slots) -> None:
        near = random_init(slots.x, 0.0, seed=0, clip=box_of(self.clip))
        near += self.START * gaussian(near, slots.seed)
        # A step along no gradient brings it into the ball and the box, and writes the model's input.
        slots.adv = pgd_step(
            near,
            torch.zeros_like(near),
            slots.x,
            alpha=0.0,
            eps=slots.eps,
            out=slots.adv,
            **self.model_input_kwargs(slots),
        )


class MIFGSM(PGD):
    """PGD with momentum, from the image itself: Dong et al. 2018 (arXiv 1710.06081, algorithm 1).

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball around the image, in the images' units, [0, 1].
        alpha: step size in the same unit; None means eps.
        steps: number of steps, at least 1.
        decay: the momentum's factor, mu.
        options: as PGD's, `schedule` among them; see `Attack`.
    """

    def __init__(
        self,
        model: AnyModel,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        **options: Any,
    ) -> None:
        self.decay = decay
        super().__init__(model, eps, alpha, steps, **{"random_start": False, **options})

    def check(self) -> None:
        super().check()
        check_number("decay", self.decay)
        if self.decay < 0:
            raise ValueError(f"decay, the momentum's factor, must be at least 0, got {self.decay}")

    def prepare(self, slots: Slots) -> None:
        dtype = torch.promote_types(slots.input.dtype, torch.float32)
        if "momentum" not in slots.memory:
            slots.memory["momentum"] = torch.empty_like(slots.x, dtype=dtype)
        slots.memory["momentum"].zero_()

    def step(self, slots: Slots, grad: torch.Tensor) -> None:
        momentum = slots.memory["momentum"]
        grad = self.in_pixels(grad).nan_to_num(0.0)
        norm = per_sample(grad.abs().flatten(1).sum(1), grad)
        momentum.mul_(self.decay).add_(grad / norm.clamp_min(torch.finfo(grad.dtype).tiny))
        super().step(slots, momentum)
