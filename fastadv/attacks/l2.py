"""The L2 attacks."""

from typing import Any

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.checks import box_of, check_number
from fastadv.attacks.engine import Slots
from fastadv.attacks.noise import gaussian, uniform_per_sample
from fastadv.attacks.pgd import PGD
from fastadv.attacks.samplewise import largest, per_sample
from fastadv.functional import to_float
from fastadv.nn.logits import AnyModel


class OnL2Ball(Attack):
    """What the L2 attacks share: how an iterate comes back into the ball."""

    norm = "L2"
    eps_for_division = 1e-12

    def leads_nowhere(self, grad: torch.Tensor) -> torch.Tensor:
        # What is added is then the larger part of the divisor, and a step a small part of its length.
        return gradient_norm(self.in_pixels(grad).nan_to_num(0.0, 0.0, 0.0)) <= self.eps_for_division

    def _unit(self, grad: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The gradient in pixels, brought to length 1; an entry that is not finite counts as 0."""
        unit = torch.nan_to_num(self.in_pixels(grad), 0.0, 0.0, 0.0, out=out)
        return unit.div_(per_sample(gradient_norm(unit) + self.eps_for_division, unit))

    def into_ball(self, slots: Slots) -> None:
        clean = to_float(slots.x)
        self._write(slots, clean, slots.adv - clean)

    def _projected(self, slots: Slots, clean: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """clean + delta, brought into the ball, then the box, in float32 at least, maybe in its memory."""
        norm = per_sample(l2_norm(delta), delta)
        inverse = norm.clamp_min(torch.finfo(norm.dtype).tiny).reciprocal()  # no 0 / 0
        shrink = (inverse * slots.eps).clamp_(max=1.0)
        return delta.to(norm.dtype).mul_(shrink).add_(clean).clamp_(*box_of(self.clip))

    def _write(self, slots: Slots, clean: torch.Tensor, delta: torch.Tensor) -> None:
        """Make clean + delta, brought into the ball and the box, the iterate and the model's next input."""
        self._become(slots, clean, self._projected(slots, clean, delta))

    def _become(self, slots: Slots, clean: torch.Tensor, adv: torch.Tensor) -> None:
        """Make adv, which is in the ball and the box, the iterate and the model's next input."""
        adv = _in_dtype_of(clean, adv, slots.eps)
        slots.adv = adv if slots.adv is None else slots.adv.copy_(adv)
        self.show(slots)


class PGDL2(OnL2Ball, PGD):
    """Projected gradient descent on the L2 ball: Madry et al. 2018 (arXiv 1706.06083, section 2.1).

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball, the L2 norm of a whole perturbation with pixels in [0, 1].
        alpha: length of a step; None means eps; also a tensor, see `Attack.alpha`.
        steps: number of steps, at least 1.
        random_start: start in a random direction at a uniformly random distance within eps, else at the image.
        eps_for_division: added to the gradient's norm. Where that is not much larger, a step is shorter than alpha; a
            warning says so.
        options: as PGD's, `schedule` among them; see `Attack`.

    Raises:
        ValueError: eps is negative, or steps is below 1.
    """

    def __init__(
        self,
        model: AnyModel,
        eps: float = 1.0,
        alpha: float | torch.Tensor | None = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
        **options: Any,
    ) -> None:
        self.eps_for_division = eps_for_division
        super().__init__(model, eps, alpha, steps, random_start, **options)

    def check(self) -> None:
        super().check()
        check_number("eps_for_division", self.eps_for_division)
        if self.eps_for_division <= 0:
            raise ValueError(f"eps_for_division must be above 0, got {self.eps_for_division}")

    def start(self, slots: Slots) -> None:
        clean = to_float(slots.x)
        delta = torch.zeros_like(clean)
        if self.random_start:
            direction = gaussian(clean, slots.seed)
            far = slots.eps * per_sample(uniform_per_sample(clean, slots.seed), clean)
            delta = direction * (far / per_sample(l2_norm(direction), clean))
        self._write(slots, clean, delta)

    def step(self, slots: Slots, grad: torch.Tensor) -> None:
        clean = to_float(slots.x)
        step = self._unit(grad)
        self._write(slots, clean, slots.adv + (self.length(slots) * step).to(step.dtype) - clean)


def _in_dtype_of(clean: torch.Tensor, adv: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
    """`adv` rounded to the images' dtype; a sample that rounding takes out of the ball, towards its image instead."""
    near = adv.to(clean.dtype)
    if near.dtype == adv.dtype:
        return near
    outside = l2_norm(near.to(adv.dtype) - clean) > (
        eps.flatten().to(adv.dtype) if isinstance(eps, torch.Tensor) else eps
    )
    further = (near.to(adv.dtype) - clean).abs() > (adv - clean).abs()
    return torch.where(per_sample(outside, near) & further, torch.nextafter(near, clean), near)


def l2_norm(t: torch.Tensor) -> torch.Tensor:
    """The L2 norm of each sample, (N,), in float32 at least."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    norms: torch.Tensor = torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=dtype)
    return norms


def gradient_norm(grad: torch.Tensor) -> torch.Tensor:
    """`l2_norm` where squares may leave the range of their type, as of a confident model's gradients, at 1e-23."""
    rows = grad.flatten(1)
    size = largest(rows).to(torch.promote_types(grad.dtype, torch.float32))
    # A power of two, so that no norm within range changes by a bit.
    scale = torch.where(size > 0, size / (2 * torch.frexp(size).mantissa), 1.0)
    return l2_norm(rows / scale[:, None]) * scale
