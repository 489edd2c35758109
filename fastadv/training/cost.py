"""The cost of an epoch of adversarial training, counted in passes of the model.

F is a forward pass of one image, Bx a backward pass to its pixels with the parameters frozen, and B a backward pass to
all parameters. With Bx = F and B = 2 F:

    standard training    F + B                       3 F
    FGSM                 (F + Bx) + (F + B)          5 F
    PGD-7                7 (F + Bx) + (F + B)       17 F

Sources: Wong et al. 2020 (arXiv 2001.03994, section 1); Shafahi et al. 2019 (arXiv 1904.12843, section 3).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from fastadv.attacks.checks import check_number, check_whole
from fastadv.names import instead


class Passes(NamedTuple):
    """The numbers of passes of one image in one epoch.

    Attributes:
        forward: forward passes, F.
        to_pixels: backward passes to the pixels, Bx.
        to_parameters: backward passes to the parameters, B.
    """

    forward: float
    to_pixels: float
    to_parameters: float

    @property
    def total(self) -> float:
        """The cost in forward passes, with Bx = F and B = 2 F as for a convolution or a matrix product."""
        return self.forward + self.to_pixels + 2 * self.to_parameters

    def __add__(self, other: tuple[Any, ...]) -> "Passes":
        return Passes(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> "Passes":
        """Each number of passes times `factor`."""
        return Passes(*(factor * each for each in self))


@dataclass(frozen=True)
class _Step:
    """The cost of a training attack, compared with the update of standard training.

    Attributes:
        gradients: gradients with respect to the pixels before the update, F + Bx each.
        updated: how many images go through the update for each image of the batch.
        to_pixels: whether the update's backward pass continues to the pixels.
        twice: gradients that are differentiated a second time.
        kept: whether images without a fresh attack skip the model.
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

    - The update of a linear probe has no backward pass through the backbone. With "full" there is a pass to the
      parameters. With any other method the backward pass goes through all layers, but computes hardly any gradient of a
      weight: it counts as a pass to the pixels.
    - An attack that needs the update's gradient of the pixels gets it for free, except with a linear probe: there it
      costs a pass to the pixels.
    - A gradient that is differentiated a second time (GradAlign) costs its own two passes, and the update's backward
      pass twice.
    - An epoch of "free" has as many updates as any other epoch, although it is only a part of a pass over the images.
    - With "cached" the images without a fresh FGSM skip the backbone, and the head costs nothing.

    Args:
        attack: a key of STEPS; None means "none".
        method: the fine-tuning method, as in `Settings`.
        steps: the number of steps of "pgd"; None means 7.
        fresh: the share of images, in [0, 1], for which "stale" or "cached" takes a fresh FGSM.
        clean: whether clean images go through the update too, as with `clean_weight`.

    Raises:
        TypeError: a number is of a wrong type.
        ValueError: there is no such attack; or a number is out of range, or does not belong to the attack.
    """
    name = "none" if attack is None else attack
    if name not in STEPS:
        raise ValueError(f"the cost of {name!r} is not known{instead(name, STEPS)}")
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
        # Two passes for the gradient, then back through both; to a linear probe's head, back through the second alone.
        again = Passes(0, 1, 0) if method == "linear" else back.times(2)
        total += Passes(1, 1, 0) + again
    return total


def price(
    attack: str | None, method: str = "full", *, steps: int | None = None, fresh: float = 0.0, clean: bool = False
) -> float:
    """The cost of an epoch divided by the cost of an epoch of standard training; arguments as of `passes`."""
    return passes(attack, method, steps=steps, fresh=fresh, clean=clean).total / passes(None, method).total


def fresh_share(price_wanted: float, method: str, clean: bool = False) -> float:
    """The share of images, in [0, 1], for which "stale" may take a fresh FGSM at a given price.

    Args:
        price_wanted: the price, as `price` returns it.
        method: the fine-tuning method.
        clean: whether clean images go through the update too.
    """
    least, most = (passes("stale", method, fresh=share, clean=clean).total for share in (0, 1))
    share = (price_wanted * passes(None, method).total - least) / (most - least)
    return min(max(share, 0.0), 1.0)
