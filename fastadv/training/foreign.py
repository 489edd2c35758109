"""Wraps an attack of another library for training."""

from collections.abc import Callable
from typing import TypeAlias

import torch

from fastadv.attacks import Attack
from fastadv.evaluation.foreign import as_images
from fastadv.functional import to_float
from fastadv.nn.frozen import frozen
from fastadv.nn.logits import AnyModel

TrainAttack: TypeAlias = Callable[[torch.Tensor, torch.Tensor], object]


class ForeignAttack:
    """Any callable from (images, labels) to images, with the attributes that training reads from an attack of fastadv.

    The callable gets images as floats, and no seed. Afterwards the model's gradients and its batch-norm statistics are
    as before.

    Args:
        attack: from images (N, ...), floats in [0, 1], and labels int64 (N,) to images of that shape.
        model: the model that it attacks.
    """

    # These facts are not known of the callable. The values here are such that training concludes nothing from them.
    draws = False
    loss = "unknown"
    start_losses: torch.Tensor | None = None
    targeted = False
    training_mode = "as_is"

    def __init__(self, attack: TrainAttack, model: AnyModel):
        self.attack, self.model = attack, model

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, *, seed: torch.Tensor | None = None) -> torch.Tensor:
        """The adversarial images, as floats of the shape of `images`; `seed` is not used.

        Raises:
            TypeError: the attack returned something other than images.
            ValueError: the attack returned images of another shape.
        """
        images = to_float(images)
        with frozen(self.model, "as_is"), torch.enable_grad():
            # Copies, for the callable may write to them.
            return as_images(self.attack(images.clone(), labels.clone()), images)

    def __repr__(self) -> str:
        return repr(self.attack)


AnyAttack: TypeAlias = Attack | ForeignAttack


def as_attack(attack: TrainAttack | None, model: AnyModel) -> AnyAttack | None:
    """The attack as training calls it: an attack of fastadv, or None, as it is; another one as a `ForeignAttack`."""
    if attack is None or isinstance(attack, Attack | ForeignAttack):
        return attack
    return ForeignAttack(attack, model)
