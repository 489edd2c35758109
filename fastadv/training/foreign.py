"""Attacks of other libraries in training."""

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
    """Any callable from (images, labels) to images, with what training asks of an attack of fastadv.

    It gets floats and no seed. What it leaves in the model is put back: gradients in the parameters, batch-norm's
    averages.

    Args:
        attack: from images (N, ...), floats in [0, 1], and labels int64 (N,) to images of that shape.
        model: which it attacks.
    """

    # What fastadv does not know of it is such that nothing is concluded from it.
    draws = False
    loss = "unknown"
    start_losses: torch.Tensor | None = None
    targeted = False
    training_mode = "as_is"

    def __init__(self, attack: TrainAttack, model: AnyModel):
        self.attack, self.model = attack, model

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, *, seed: torch.Tensor | None = None) -> torch.Tensor:
        """The adversarial images, like `images` as floats; `seed` is not used.

        Raises:
            TypeError: the attack returns something else than images.
            ValueError: it returns images of another shape.
        """
        images = to_float(images)
        with frozen(self.model, "as_is"), torch.enable_grad():
            return as_images(self.attack(images, labels), images)

    def __repr__(self) -> str:
        return repr(self.attack)


AnyAttack: TypeAlias = Attack | ForeignAttack


def as_attack(attack: TrainAttack | None, model: AnyModel) -> AnyAttack | None:
    """The attack as training calls it: one of fastadv as it is, another one as a `ForeignAttack`, None as None."""
    if attack is None or isinstance(attack, Attack | ForeignAttack):
        return attack
    return ForeignAttack(attack, model)
