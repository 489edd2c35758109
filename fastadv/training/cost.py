"""What an epoch of adversarial training costs, counted in passes of the model: the field's cost model.

F is a forward pass of an image, Bx a backward pass to its pixels with the parameters frozen, B a backward pass to all
parameters. Standard training is F + B, FGSM (F + Bx) + (F + B), PGD-K K (F + Bx) + (F + B): Wong et al. 2020
(arXiv 2001.03994, section 1) and Shafahi et al. 2019 (arXiv 1904.12843, section 3) count so.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from fastadv.attacks.checks import check_number, check_whole


class Passes(NamedTuple):
    """Passes of one image in one epoch.

    Attributes:
        forward: F.
        to_pixels: Bx.
        to_parameters: B.
    """

    forward: float
    to_pixels: float
    to_parameters: float

    @property
    def total(self) -> float:
        """In forward passes, with Bx = F and B = 2 F: a convolution's or a matrix product's."""
        return self.forward + self.to_pixels + 2 * self.to_parameters

    def __add__(self, other: tuple[Any, ...]) -> "Passes":
        return Passes(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> "Passes":
        """Each number of passes times `factor`."""
        return Passes(*(factor * each for each in self))


@dataclass(frozen=True)
class _Step:
    """What a method of training adds to the update of standard training.

    Attributes:
        gradients: passes forward and back to the pixels before the update.
        updated: images that go through the update for each image of the batch.
        to_pixels: whether the update's backward pass goes on to the pixels.
        twice: gradients that are differentiated once more.
        kept: whether the images without a fresh attack do not go through the model.
    """

    gradients: int = 1
    updated: int = 1
    to_pixels: bool = False
    twice: int = 0
    kept: bool = False


STEPS = {
    "none": _Step(gradients=0),
    "fgsm": _Step(),
    "fgsm-rs": _Step(),
    "nfgsm": _Step(),
    "zerograd": _Step(),
    "pgd": _Step(gradients=7),
    "stale": _Step(gradients=0, to_pixels=True),
    "cached": _Step(gradients=0, kept=True),
    "gradalign": _Step(twice=1),
    "free": _Step(gradients=0, to_pixels=True),
    "fgsm-pgi": _Step(updated=2),
    "liet": _Step(updated=2),
    "sora": _Step(to_pixels=True),
}


def passes(
    attack: str | None, method: str = "full", *, steps: int | None = None, fresh: float = 0.0, clean: bool = False
) -> Passes:
    """The passes of one image in one epoch.

    The update of a linear probe needs no backward pass through the backbone. The update of every other method but
    "full" goes back through all layers and computes next to no weight's gradient: that is a pass to the pixels. A
    method that asks the update for the gradient of the pixels gets it for nothing there; with a linear probe it costs a
    pass to the pixels. A gradient that is differentiated once more (GradAlign) costs that gradient's two passes and
    twice the update's. An epoch of "free" has as many updates as any other: it is a share of a pass over the images.
    With "cached" the images that get no fresh FGSM do not go through the backbone, and the head costs nothing.

    Args:
        attack: a key of STEPS; None means "none".
        method: what trains, as in `Settings`.
        steps: of "pgd"; None means 7.
        fresh: the share of images, in [0, 1], that "stale" or "cached" gives a fresh FGSM.
        clean: whether clean images go through the update too, as with `clean_weight`.

    Raises:
        TypeError: a number is none.
        ValueError: no such attack, or a number that is out of range or not the attack's.
    """
    name = "none" if attack is None else attack
    if name not in STEPS:
        raise ValueError(f"the cost of {name!r} is not known; there are {', '.join(STEPS)}")
    step = STEPS[name]
    check_number("fresh", fresh)
    if not 0 <= fresh <= 1:
        raise ValueError(f"fresh is a share in [0, 1], got {fresh}")
    if steps is not None and name != "pgd":
        raise ValueError(f"steps are of pgd, and the attack is {name}")
    if fresh and name not in ("stale", "cached"):
        raise ValueError(f"fresh is a share of the images of stale and cached, and the attack is {name}")
    if step.kept and (method != "linear" or clean):
        raise ValueError(f"{name} is for linear probing on attacked images alone")
    if steps is not None:
        check_whole("steps", steps)
    count = step.gradients if steps is None else steps
    back = Passes(0, 0, 1) if method == "full" else Passes(0, 0 if method == "linear" else 1, 0)
    update = Passes(1, 0, 0) + back
    if step.to_pixels and method == "linear":
        update += (0, 1, 0)
    updated = fresh if step.kept else step.updated
    total = Passes(1, 1, 0).times(count + fresh) + update.times(updated + clean)
    if step.twice:
        # Its own two passes, then back through both of them; a head alone is reached through the second.
        again = Passes(0, 1, 0) if method == "linear" else back.times(2)
        total += Passes(1, 1, 0) + again
    return total


def price(
    attack: str | None, method: str = "full", *, steps: int | None = None, fresh: float = 0.0, clean: bool = False
) -> float:
    """The time of an epoch divided by the time of an epoch of standard training; arguments as of `passes`."""
    return passes(attack, method, steps=steps, fresh=fresh, clean=clean).total / passes(None, method).total


def fresh_share(price_wanted: float, method: str, clean: bool = False) -> float:
    """The share of images that "stale" gives a fresh FGSM so that its `price` is the one wanted, in [0, 1]."""
    least, most = (passes("stale", method, fresh=share, clean=clean).total for share in (0, 1))
    share = (price_wanted * passes(None, method).total - least) / (most - least)
    return min(max(share, 0.0), 1.0)
