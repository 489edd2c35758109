"""Wraps an attack of another library for training."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch

from fastadv._warnings import warn
from fastadv.attacks import Attack
from fastadv.evaluation.adversaries import eps_of, norm_of
from fastadv.evaluation.foreign import Reach, as_images, farther, measured
from fastadv.functional import to_float
from fastadv.nn.frozen import frozen_for_callable
from fastadv.nn.logits import AnyModel

TrainAttack: TypeAlias = Callable[[torch.Tensor, torch.Tensor], object]


class ForeignAttack:
    """Any callable from (images, labels) to images, with the attributes that training reads from an attack of fastadv.

    The callable gets images as floats, and no seed. Afterwards the model's gradients and its batch-norm statistics are
    as before. What it returns is measured on the device. `tell` looks at that and warns; a call does so after the calls
    1, 2, 4, 8, ..., for each look waits for the device.

    Args:
        attack: from images (N, ...), floats in [0, 1], and labels int64 (N,) to images of that shape.
        model: the model that it attacks.
        eps: the budget of the training in L-inf; None means the callable's own alone.
    """

    # These facts are not known of the callable. The values here are such that training concludes nothing from them.
    draws = False
    loss = "unknown"
    start_losses: torch.Tensor | None = None
    targeted = False
    training_mode = "as_is"

    def __init__(self, attack: TrainAttack, model: AnyModel, eps: float | None = None):
        self.attack, self.model, self.eps = attack, model, eps
        self._calls = 0
        self._far: torch.Tensor | None = None  # of all calls, as `measured` returns it
        self._dtype = torch.float32  # of the images
        self._told: set[str] = set()

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, *, seed: torch.Tensor | None = None) -> torch.Tensor:
        """The adversarial images, as floats of the shape of `images`; `seed` is not used.

        Raises:
            TypeError: the attack returned something other than images.
            ValueError: the attack returned images of another shape.
        """
        images = to_float(images)
        with frozen_for_callable(self.model):
            # Copies, for the callable may write to them.
            adv = as_images(self.attack(images.clone(), labels.clone()), images)
        _, far = measured(adv, images)
        self._far = far if self._far is None else farther(self._far, far)
        self._calls, self._dtype = self._calls + 1, images.dtype
        if self._calls & (self._calls - 1) == 0:
            self.tell()
        return adv

    def tell(self) -> None:
        """Warn where images so far were not finite, or left [0, 1] or the budget, once of each."""
        for kind, note in self._notes():
            if kind not in self._told:
                self._told.add(kind)
                warn(note)

    def of_nonfinite(self) -> str:
        """Words for an error: how many images so far were not finite; "" for none."""
        return "".join(f". {note}" for kind, note in self._notes() if kind == "finite")

    def _notes(self) -> Iterator[tuple[str, str]]:
        """(kind of fault, what is wrong)."""
        if self._far is None:
            return
        reach, name = Reach.read(self._far, self._dtype), f"the attack {_named(self.attack)}"
        if reach.nonfinite:
            yield "finite", f"{reach.nonfinite} of the images that {name} returned are not finite: mend the attack"
        if reach.leaves_box():
            yield (
                "box",
                f"the images that {name} returned go from {reach.low:.6g} to {reach.high:.6g}, and training takes "
                "images in [0, 1]: clamp them, and let it neither take nor return normalised images",
            )
        for eps, norm in ((eps_of(self.attack), norm_of(self.attack)), (self.eps, "Linf")):
            if eps is not None and reach.exceeds(eps, norm):
                yield (
                    "eps",
                    f"the images that {name} returned are up to {reach.linf:.6g} in L-inf and {reach.l2:.6g} in L2 "
                    f"from the clean ones, beyond eps = {eps:.6g}. Does it take its eps in the images' unit, such as "
                    "8/255 and not 8? An attack that is meant to leave the ball can be used",
                )

    def __repr__(self) -> str:
        return repr(self.attack)


AnyAttack: TypeAlias = Attack | ForeignAttack


def as_attack(attack: TrainAttack | None, model: AnyModel, eps: float | None = None) -> AnyAttack | None:
    """The attack as training calls it: an attack of fastadv, or None, as it is; another one as a `ForeignAttack`."""
    if attack is None or isinstance(attack, Attack | ForeignAttack):
        return attack
    return ForeignAttack(attack, model, eps)


def _named(attack: object) -> str:
    return getattr(attack, "__qualname__", type(attack).__qualname__)
