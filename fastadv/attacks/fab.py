"""The fast adaptive boundary attack."""

from collections.abc import Callable

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.checks import box_of, check_number, check_whole
from fastadv.attacks.engine import Slots
from fastadv.attacks.hyperplane import to_hyperplane
from fastadv.attacks.l2 import l2_norm
from fastadv.attacks.rows import per_sample
from fastadv.data import to_float
from fastadv.functional import random_init

LEAST = 1e-8  # of the two distances to a plane, so that their shares exist


class FAB(Attack):
    """The targeted fast adaptive boundary attack, in L-inf: Croce and Hein 2020 (arXiv 1907.02044, algorithm 1).

    It looks for the nearest misclassified point, whatever eps is. Each step goes to the plane on which the label's
    logit and the target class's are equal, both linearised where the iterate is, and a little towards the image. A step
    that ends misclassified is followed by one back towards the image, which needs no gradient and is not counted.

    A call goes for the `target_classes` best other classes of the clean image, one after the other, and returns the
    nearest misclassified point if it is within eps of the image, else the image itself. An evaluation counts an image
    as fooled at the first such point. There is no random start: more than one restart would repeat the first.

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the L-inf ball around the image, in pixels of [0, 1].
        steps: to planes, for each target class.
        alpha_max: the largest share of the image's own way to the plane in a step.
        eta: by what a step goes further than to the plane, as a factor, at least 1.
        beta: by what the way from the image is shortened after a misclassified iterate, as a factor below 1.
        options: see `Attack`; the loss is "targeted_margin".

    Raises:
        ValueError: eps is not in [0, 1], or a setting is beyond its range.
    """

    def __init__(
        self,
        model: Callable,
        eps: float = 8 / 255,
        steps: int = 100,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        **options,
    ):
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
        if self.loss != "targeted_margin":
            raise ValueError(f"FAB goes to planes of equal logits, loss='targeted_margin', got {self.loss!r}")

    @property
    def iterations(self) -> int:
        # Each step to a plane may be followed by one back; in the last the last iterate is judged.
        return 2 * self.steps + 1

    def start(self, slots: Slots) -> None:
        slots.adv = random_init(slots.x, 0.0, seed=0, out=slots.adv, **self.also(slots))

    def prepare(self, slots: Slots) -> None:
        """planes: steps to planes so far; back: whether the last step was one back towards the image; nearest: the
        nearest misclassified iterate, at `distance`, which is infinite before there is one."""
        memory, dtype = slots.memory, torch.promote_types(slots.adv.dtype, torch.float32)
        if "nearest" not in memory:
            rows = slots.adv.new_empty(len(slots.adv), dtype=dtype)
            memory["nearest"], memory["distance"] = torch.empty_like(slots.adv), rows
            memory["planes"], memory["back"] = rows.long(), rows.bool()
        memory["nearest"].copy_(slots.adv)
        memory["distance"].fill_(torch.inf)
        memory["planes"].zero_()
        memory["back"].zero_()

    def ended(self, slots: Slots) -> torch.Tensor:
        return slots.memory["planes"] >= self.steps

    def inside(self, slots: Slots) -> torch.Tensor:
        dtype = slots.memory["distance"].dtype
        return _within(self._length(slots.adv.to(dtype) - to_float(slots.x).to(dtype)), slots.eps)

    def step(self, slots: Slots, grad: torch.Tensor) -> None:
        memory, dtype = slots.memory, slots.memory["distance"].dtype
        clean, adv = to_float(slots.x).to(dtype), slots.adv.to(dtype)
        fooled, ended = self.fooled(slots.logits, slots.targets), self.ended(slots)
        self._keep(slots, fooled, self._length(adv - clean))

        back = fooled & ~memory["back"]
        nearer = clean + self.beta * (adv - clean)
        there = self._towards_plane(clean, adv, self.in_pixels(grad).nan_to_num(0.0), slots.losses)
        following = torch.where(per_sample(back, adv), nearer, there).clamp_(*box_of(self.clip))
        slots.adv.copy_(torch.where(per_sample(ended, adv), adv, following))
        if slots.z is not None:
            slots.z.copy_(self._normalization(slots.adv))
        memory["planes"] += ~(back | ended)
        memory["back"].copy_(back)

    def result(self, slots: Slots) -> torch.Tensor:
        found = _within(slots.memory["distance"], slots.eps)
        return torch.where(per_sample(found, slots.adv), slots.memory["nearest"], to_float(slots.x))

    def strength(self, slots: Slots, losses: torch.Tensor) -> torch.Tensor:
        return -slots.memory["distance"]

    def _length(self, delta: torch.Tensor) -> torch.Tensor:
        """Of each row, (N,)."""
        return l2_norm(delta) if self.norm == "L2" else delta.flatten(1).abs().amax(1)

    def _keep(self, slots, fooled, distance):
        memory = slots.memory
        nearer = fooled & (distance < memory["distance"])
        memory["distance"].copy_(torch.where(nearer, distance, memory["distance"]))
        memory["nearest"].copy_(torch.where(per_sample(nearer, slots.adv), slots.adv, memory["nearest"]))

    def _towards_plane(self, clean, adv, normal, gap):
        """A step to the plane through which `gap`, the margin, is 0 by its gradient `normal`."""
        n, normal = len(adv), normal.flatten(1)
        gap = gap.to(normal.dtype)
        gaps = torch.stack((gap, gap + (normal * (clean - adv).flatten(1)).sum(1)))
        points = torch.stack((adv.flatten(1), clean.flatten(1)))
        moves = to_hyperplane(points, normal, gaps, self.norm, box_of(self.clip))
        from_adv, from_clean = self._length(moves.flatten(0, 1)).clamp_min(LEAST).reshape(2, n)
        share = (from_adv / (from_adv + from_clean)).clamp(max=self.alpha_max)
        from_adv, from_clean = points.add_(moves, alpha=self.eta)
        return from_adv.lerp(from_clean, share[:, None]).reshape(adv.shape)


class FABL2(FAB):
    """The targeted fast adaptive boundary attack, in L2: Croce and Hein 2020 (arXiv 1907.02044, algorithm 1).

    Args: as FAB's; eps: the L2 norm of a whole perturbation with pixels in [0, 1].
    """

    norm = "L2"

    def __init__(self, model: Callable, eps: float = 0.5, *args, **options):
        super().__init__(model, eps, *args, **options)


def _within(distance: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
    return distance <= (eps.flatten().to(distance.dtype) if isinstance(eps, torch.Tensor) else eps)
