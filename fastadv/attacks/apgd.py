"""Auto-PGD: step sizes that follow the loss, so that there is none to choose."""

from typing import Any

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.checks import check_number, check_whole
from fastadv.attacks.engine import Slots
from fastadv.attacks.l2 import OnL2Ball, l2_norm
from fastadv.attacks.noise import gaussian, uniform
from fastadv.attacks.samplewise import any_of, per_sample, put_
from fastadv.functional import Normalization, pgd_step, to_float
from fastadv.nn.logits import AnyModel
from fastadv.ops.autograd import result_like
from fastadv.ops.reference import compute_dtype

SHARE = 0.75  # of the new step in the next iterate
MOMENTUM = 1 - SHARE  # a power of two: its products are exact, fused with an addition or not
TINY = 1e-12  # added to a norm that something is divided by


class APGD(Attack):
    """Auto-PGD on the L-inf ball: Croce and Hein 2020 (arXiv 2003.01690, section 3).

    Steps with momentum, at first of 2 eps. At some checkpoints a sample's step is halved and it goes on from its best
    iterate so far: where its loss rose in too few of the steps since the last one, or where neither its step size nor
    its best loss has changed since. The result is the best iterate of all, a misclassified one before any other.

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball around the image, in the images' units, [0, 1].
        steps: number of steps, at least 1; the checkpoints follow it.
        rho: the share of the steps between two checkpoints, in [0, 1], that must have raised the loss.
        options: see `Attack`. The authors' ensemble has the losses "ce" and "targeted_dlr".

    Raises:
        ValueError: eps or rho is not in [0, 1], or steps is below 1.
    """

    draws = True
    by_age = True
    steps: int

    def __init__(
        self, model: AnyModel, eps: float = 8 / 255, steps: int = 100, *, rho: float = 0.75, **options: Any
    ) -> None:
        super().__init__(model, eps, **{"best_iterate": True, **options})
        self.steps = steps
        self.rho = rho
        self.check()

    def check(self) -> None:
        super().check()
        check_whole("steps", self.steps)
        check_number("rho", self.rho)
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho must be in [0, 1], got {self.rho}")

    def start(self, slots: Slots) -> None:
        """A uniform direction, scaled to reach the ball's boundary."""
        clean = to_float(slots.x)
        direction = 2 * uniform(clean, slots.seed) - 1
        direction /= per_sample(direction.flatten(1).abs().amax(1) + TINY, direction)
        near = clean + slots.eps * direction
        out = result_like(slots.x) if slots.adv is None else slots.adv
        # A step of no length brings it into the ball and the box, and writes the model's input.
        slots.adv = pgd_step(near, near, slots.x, alpha=0.0, eps=slots.eps, out=out, **self.model_input_kwargs(slots))

    def prepare(self, slots: Slots) -> None:
        memory = slots.memory
        if not memory:
            compute = compute_dtype(slots.x)
            memory["previous"] = torch.empty_like(slots.adv, dtype=compute)
            memory["best"] = torch.empty_like(slots.adv)
            memory["best_direction"] = self._empty_direction(slots)
            for name in ("length", "share"):  # of a step, in eps; of the new step in the next iterate
                memory[name] = slots.x.new_empty(len(slots.x), dtype=compute)
            for name in ("best_loss", "last_loss", "checked_loss", "rises"):
                memory[name] = slots.x.new_empty(len(slots.x), dtype=torch.float64)
            for name in ("interval", "checkpoint"):
                memory[name] = torch.empty_like(slots.age)
            memory["halved"] = slots.x.new_empty(len(slots.x), dtype=torch.bool)
        memory["previous"].copy_(slots.adv)
        memory["best"].copy_(slots.adv)
        memory["best_direction"].zero_()
        before = {"length": 2, "share": 1, "best_loss": -torch.inf, "last_loss": torch.inf, "checked_loss": -torch.inf}
        interval = self._share(0.22)
        before |= {"interval": interval, "checkpoint": interval, "rises": 0, "halved": True}
        for name, value in before.items():
            memory[name].fill_(value)

    def _share(self, share: float) -> int:
        """This share of the steps, rounded down, at least one."""
        return max(int(share * self.steps), 1)

    def step(self, slots: Slots, grad: torch.Tensor) -> None:
        memory, scratch = slots.memory, slots.scratch
        if "direction" not in scratch:
            scratch["direction"] = self._empty_direction(slots)
        direction = self._direction(grad, scratch["direction"])
        self._remember(slots, direction)
        self._count(slots)
        due = slots.age == memory["checkpoint"]
        if any_of(due):
            back = self._check(memory, due)
            put_(slots.adv, back, memory["best"])
            put_(direction, back, memory["best_direction"])
        length = slots.eps * per_sample(memory["length"], direction)
        self._move(slots, direction, length, per_sample(memory["share"], direction))
        memory["share"].fill_(SHARE)  # the first step has no other before it

    def _empty_direction(self, slots: Slots) -> torch.Tensor:
        return torch.empty_like(slots.input)

    def _direction(self, grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The direction in which the loss rises most; 0 where the gradient is NaN."""
        return torch.sign(grad, out=out)

    def _remember(self, slots: Slots, direction: torch.Tensor) -> None:
        """The iterate and the direction there, where its loss is the largest so far."""
        memory = slots.memory
        larger = slots.losses > memory["best_loss"]
        put_(memory["best"], larger, slots.adv)
        put_(memory["best_direction"], larger, direction)
        torch.where(larger, slots.losses, memory["best_loss"], out=memory["best_loss"])

    def _count(self, slots: Slots) -> None:
        """Whether the loss rose in the last step."""
        last = slots.memory["last_loss"]
        slots.memory["rises"] += slots.losses > last
        # The start's loss is not known to the counter, as in the authors' code: 0 stands for it.
        last.copy_(slots.losses.masked_fill(slots.age == 0, 0.0))

    def _check(self, memory: dict[str, torch.Tensor], due: torch.Tensor) -> torch.Tensor:
        """Halve what has to be, of the samples at a checkpoint. Which ones go back to their best, (N,) bool."""
        interval, rises, halved = (memory[name] for name in ("interval", "rises", "halved"))
        stuck = ~halved & (memory["checked_loss"] >= memory["best_loss"])
        halve = due & ((rises <= self.rho * interval.double()) | stuck)
        memory["length"].mul_(torch.where(halve, 0.5, 1.0))
        interval.sub_(self._share(0.03) * due).clamp_(min=self._share(0.06))
        memory["checkpoint"] += interval * due
        for name, value in {"halved": halve, "checked_loss": memory["best_loss"]}.items():
            torch.where(due, value, memory[name], out=memory[name])
        rises.masked_fill_(due, 0)
        return halve

    def _move(self, slots: Slots, direction: torch.Tensor, length: torch.Tensor, share: torch.Tensor) -> None:
        """The step from where the samples are now; length and share are (N, 1, ...), and direction's memory is free."""
        previous, also = slots.memory["previous"], self.model_input_kwargs(slots)
        apgd_step_(slots.adv, previous, direction, slots.x, alpha=length, share=share, eps=slots.eps, **also)


class APGDL2(OnL2Ball, APGD):
    """Auto-PGD on the L2 ball: Croce and Hein 2020 (arXiv 2003.01690, section 3).

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball, the L2 norm of a whole perturbation with pixels in [0, 1].
        steps: number of steps, at least 1.
        options: as APGD's, `rho` among them; see `Attack`.
    """

    def __init__(self, model: AnyModel, eps: float = 0.5, steps: int = 100, **options: Any) -> None:
        super().__init__(model, eps, steps, **options)

    def start(self, slots: Slots) -> None:
        """A random direction, as long as the ball allows."""
        clean = to_float(slots.x)
        direction = gaussian(clean, slots.seed)
        inverse = per_sample((l2_norm(direction) + TINY).reciprocal(), clean)
        self._write(slots, clean, direction * (inverse * slots.eps))

    def _empty_direction(self, slots: Slots) -> torch.Tensor:
        return torch.empty_like(slots.input, dtype=torch.promote_types(slots.input.dtype, torch.float32))

    def _direction(self, grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return self._unit(grad, out)

    def _move(self, slots: Slots, direction: torch.Tensor, length: torch.Tensor, share: torch.Tensor) -> None:
        clean, here, previous = to_float(slots.x), slots.adv, slots.memory["previous"]
        target = self._projected(slots, clean, direction.mul_(length).add_(here).sub_(clean))
        self._write(slots, clean, mixed_(target, here, previous, share).sub_(clean))


def apgd_step_(
    x_adv: torch.Tensor,
    x_prev: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    *,
    alpha: torch.Tensor,
    share: torch.Tensor,
    eps: float | torch.Tensor,
    clip: tuple[float, float],
    normalization: Normalization | None = None,
    z: torch.Tensor | None = None,
) -> None:
    """Take one L-inf step with momentum, in place.

    Every operation rounds once: t = pgd_step(x_adv), u = ((t - x_adv) share + x_adv) + (x_adv - x_prev) MOMENTUM, and u
    brought into the ball and the box.

    Args:
        x_adv: the iterate, which becomes the next one.
        x_prev: the iterate before it, of the compute type; it becomes what x_adv was.
        grad: the direction, like x_adv; its memory is free afterwards.
        x: clean images.
        alpha: step size, of the compute type, (N, 1, ...).
        share: of the new step in the next iterate, likewise.
        eps: radius of the ball, in the images' units, [0, 1].
        clip: (lo, hi), the box.
        normalization: with z, what the model does to its input first.
        z: takes the model's next input.
    """
    target = pgd_step(x_adv, grad, x, alpha=alpha, eps=eps, clip=clip, out=grad).to(x_prev.dtype)
    mixed = mixed_(target, x_adv, x_prev, share)
    pgd_step(mixed, grad, x, alpha=0.0, eps=eps, clip=clip, out=x_adv, normalization=normalization, z=z)


def mixed_(target: torch.Tensor, here: torch.Tensor, previous: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """((target - here) share + here) + (here - previous) MOMENTUM, in target's memory; `previous` becomes `here`."""
    momentum = torch.sub(here, previous, out=previous)
    target.sub_(here).mul_(share).add_(here).add_(momentum, alpha=MOMENTUM)
    previous.copy_(here)
    return target
