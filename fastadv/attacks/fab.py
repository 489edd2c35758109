"""The fast adaptive boundary attack."""

import math
from typing import Any

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.checks import box_of, check_number, check_whole
from fastadv.attacks.engine import Slots
from fastadv.attacks.hyperplane import to_hyperplane
from fastadv.attacks.l2 import gradient_norm, l2_norm
from fastadv.attacks.noise import gaussian, uniform
from fastadv.attacks.samplewise import any_of, largest, per_sample, put_
from fastadv.functional import random_init, to_float
from fastadv.nn.logits import AnyModel

LEAST = 1e-8  # of the two distances to a plane, so that their shares exist


class FAB(Attack):
    """The fast adaptive boundary attack, in L-inf: Croce and Hein 2020 (arXiv 1907.02044, algorithm 1).

    It looks for the nearest misclassified point, whatever eps is. Each step goes to the plane on which the label's
    logit and another class's are equal, both linearised where the step begins, and a little towards the image. It
    begins at the iterate, or where that is misclassified a part of the way back to the image: so a step takes the
    verdict's forward pass, and then a gradient.

    The other class is, one after the other, each of the `target_classes` best of the clean image: FAB-T. With
    loss="margin" it is that of the nearest plane, anew in each step, which then takes a gradient for each class: FAB.

    A call returns the nearest misclassified point of all runs if it is within eps of the image, else the image itself.
    An evaluation counts an image as fooled at the first such point. The first run, of each target class, starts at
    the image, and further restarts at random at a distance of eps / 2.

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the L-inf ball around the image, in the images' units, [0, 1].
        steps: of a run.
        alpha_max: the largest share of the image's own way to the plane in a step.
        eta: by what a step goes further than to the plane, as a factor, at least 1.
        beta: by what the way from the image is shortened where an iterate is misclassified, as a factor of at most 1.
        options: see `Attack`; the loss is "targeted_margin", or "margin", which takes no eot. Its compile leaves out
            the gradients of the latter.

    Raises:
        ValueError: eps is not in [0, 1], or a setting is beyond its range.
    """

    by_gradient = False  # it takes its own, after the verdict
    by_age = True

    steps: int

    def __init__(
        self,
        model: AnyModel,
        eps: float = 8 / 255,
        steps: int = 100,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, **{"loss": "targeted_margin", **options})
        self.steps = steps
        self.alpha_max = alpha_max
        self.eta = eta
        self.beta = beta
        self.check()

    def check(self) -> None:
        super().check()
        check_whole("steps", self.steps)
        for name, least, most in (("alpha_max", 0.0, 1.0), ("eta", 1.0, float("inf")), ("beta", 0.0, 1.0)):
            value = getattr(self, name)
            check_number(name, value)
            if not least <= value <= most:
                raise ValueError(f"{name} must be in [{least:g}, {most:g}], got {value}")
        if self.loss not in ("targeted_margin", "margin") or self.targeted:
            raise ValueError(
                "FAB goes to planes of equal logits, loss='targeted_margin' or 'margin' with targeted=False, got "
                f"{self.loss!r} and {self.targeted!r}"
            )
        if self.loss == "margin" and self.eot > 1:
            raise ValueError(
                "FAB with loss='margin' takes the gradients of all classes from one draw, which eot does not average: "
                f"leave eot at 1, got {self.eot}, or pass loss='targeted_margin'"
            )

    @property
    def draws(self) -> bool:
        return self.restarts > 1

    def start(self, slots: Slots) -> None:
        slots.adv = random_init(slots.x, 0.0, seed=0, out=slots.adv, **self.model_input_kwargs(slots))
        if not self.draws:
            return
        clean = to_float(slots.x)
        way = gaussian(clean, slots.seed) if self.norm == "L2" else 2 * uniform(clean, slots.seed) - 1
        way *= per_sample(self._length(way).reciprocal(), way) * (slots.eps / 2)
        again = slots.restart % self.restarts > 0
        slots.adv.copy_(torch.where(per_sample(again, clean), clean + way, clean).clamp_(*box_of(self.clip)))
        self.show(slots)

    def prepare(self, slots: Slots) -> None:
        """Make the memory of a run.

        It holds "nearest", the nearest misclassified iterate; its "distance", infinite before there is one; and "away",
        the distance of the iterate, as `inside` found it.
        """
        memory, adv = slots.memory, slots.adv
        if "nearest" not in memory:
            memory["nearest"] = torch.empty_like(adv)
            for name in ("distance", "away"):
                memory[name] = adv.new_empty(len(adv), dtype=torch.promote_types(adv.dtype, torch.float32))
        memory["nearest"].copy_(adv)
        memory["distance"].fill_(torch.inf)

    def inside(self, slots: Slots) -> torch.Tensor:
        clean, adv = self._pixels(slots)
        move = torch.sub(adv, clean, out=self._scratch(slots)[0, 0].view_as(adv))
        away = slots.memory["away"].copy_(self._length(move))
        return _within(away, slots.eps)

    def step(self, slots: Slots, grad: torch.Tensor | None) -> None:
        fooled = self._keep(slots, slots.logits)
        if any_of(fooled):
            clean, adv = self._pixels(slots)
            back = torch.sub(adv, clean, out=self._scratch(slots)[0, 0].view_as(adv))
            back.mul_(self.beta).add_(clean).clamp_(*box_of(self.clip))
            put_(slots.adv, fooled, back.to(slots.adv.dtype))
            self.show(slots)
        beyond = self._towards_plane(self._scratch(slots), *self._pixels(slots), *self._plane(slots))
        slots.adv.copy_(beyond.clamp_(*box_of(self.clip)))
        self.show(slots)

    def result(self, slots: Slots) -> torch.Tensor:
        self.inside(slots)
        self._keep(slots, self.objective.logits(slots.input))
        found = _within(slots.memory["distance"], slots.eps)
        return torch.where(per_sample(found, slots.adv), slots.memory["nearest"], to_float(slots.x))

    def cost(self, classes: int) -> tuple[int, int]:
        return (classes if self.loss == "margin" else self.eot), self.eot

    def strength(self, slots: Slots, losses: torch.Tensor) -> torch.Tensor:
        return -slots.memory["distance"]

    def _pixels(self, slots: Slots) -> tuple[torch.Tensor, torch.Tensor]:
        """The pixels of the images and of the iterates, in float32 at least."""
        dtype = slots.memory["distance"].dtype
        return to_float(slots.x).to(dtype), slots.adv.to(dtype)

    def _length(self, moves: torch.Tensor) -> torch.Tensor:
        """The length of each row in the attack's norm, (N,)."""
        return l2_norm(moves) if self.norm == "L2" else largest(moves.flatten(1))

    def _scratch(self, slots: Slots) -> torch.Tensor:
        """Memory for four tensors of two points an image each: (4, 2, N, D)."""
        if "planes" not in slots.scratch:
            shape = (4, 2, len(slots.adv), math.prod(slots.adv.shape[1:]))
            slots.scratch["planes"] = slots.adv.new_empty(shape, dtype=slots.memory["distance"].dtype)
        return slots.scratch["planes"]

    def _keep(self, slots: Slots, logits: torch.Tensor | None) -> torch.Tensor:
        """Which iterates are misclassified, (N,); of each sample the nearest is kept."""
        memory = slots.memory
        fooled = self.fooled(logits, slots.targets)
        if fooled is None:
            raise TypeError("FAB judges its iterates by their logits, and the model gave none")
        nearer = fooled & (memory["away"] < memory["distance"])
        torch.where(nearer, memory["away"], memory["distance"], out=memory["distance"])
        if any_of(nearer):  # which an iterate that is not finite is not: put_ would spread it
            nearest = memory["nearest"]
            torch.where(per_sample(nearer, nearest), slots.adv, nearest, out=nearest)
        return fooled

    def _plane(self, slots: Slots) -> tuple[torch.Tensor, torch.Tensor]:
        """(normal, like the images; gap (N,)): gap is another class's logit minus the label's, normal its gradient."""
        if self.loss == "targeted_margin":
            grad, gap, _ = self.objective.gradient(slots.input, self.aim(slots))
            return self.in_pixels(grad).nan_to_num(0.0), gap
        nearest: tuple[torch.Tensor, ...] = ()
        for grad, gap in self.objective.margins(slots.input, slots.targets):
            normal = self.in_pixels(grad).nan_to_num(0.0)
            size = gradient_norm(normal) if self.norm == "L2" else normal.flatten(1).abs().sum(1)
            distance = torch.where(size > 0, gap.abs() / size, torch.inf)  # the label's own has no gradient
            plane: tuple[torch.Tensor, ...] = distance, normal, gap
            if nearest:
                nearer = distance < nearest[0]
                plane = tuple(
                    torch.where(per_sample(nearer, t), t, best) for t, best in zip(plane, nearest, strict=True)
                )
            nearest = plane
        self.objective.show(nearest[1])
        return nearest[1], nearest[2]

    def _towards_plane(
        self, scratch: torch.Tensor, clean: torch.Tensor, adv: torch.Tensor, normal: torch.Tensor, gap: torch.Tensor
    ) -> torch.Tensor:
        """A step to the plane through which `gap`, the margin, is 0 by its gradient `normal`."""
        n, normal = len(adv), normal.flatten(1)
        gap = gap.to(normal.dtype)
        points, work = scratch[0], scratch[1:]
        between = torch.sub(clean.flatten(1), adv.flatten(1), out=points[0]).mul_(normal).sum(1)
        torch.stack((adv.flatten(1), clean.flatten(1)), out=points)
        moves = to_hyperplane(points, normal, torch.stack((gap, gap + between)), self.norm, box_of(self.clip), work)
        beyond: torch.Tensor
        far, far_clean = self._length(moves.flatten(0, 1)).clamp_min(LEAST).reshape(2, n)
        share = (far / (far + far_clean)).clamp(max=self.alpha_max)
        beyond, beyond_clean = points.add_(moves, alpha=self.eta)
        return beyond.lerp(beyond_clean, share[:, None]).reshape(adv.shape)


class FABL2(FAB):
    """The fast adaptive boundary attack, in L2: Croce and Hein 2020 (arXiv 1907.02044, algorithm 1).

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball, the L2 norm of a whole perturbation with pixels in [0, 1].
        args: steps, alpha_max, eta and beta, as FAB's.
        options: as FAB's; see `Attack`.
    """

    norm = "L2"

    def __init__(self, model: AnyModel, eps: float = 0.5, *args: Any, **options: Any) -> None:
        super().__init__(model, eps, *args, **options)


def _within(distance: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
    return distance <= (eps.flatten().to(distance.dtype) if isinstance(eps, torch.Tensor) else eps)
