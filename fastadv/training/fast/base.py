"""What adversarial training may be beside an attack and the loss at its result."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fastadv.attacks import FGSM, Attack
from fastadv.attacks.checks import check_eps
from fastadv.attacks.state import frozen
from fastadv.training.augment import Augment


class FastMethod:
    """A method of training, for a `Step` in the place of its attack; a subclass is one of the table `FAST`.

    An update calls `begin`, for each part of its batch `attacked`, `learn`, `distances` and `seen`, then `end`. What
    `state` gives, and what `open` found in the folder, is all that an update depends on beside weights, images and
    seeds.

    Args:
        model: from images in [0, 1] to logits.
        eps: budget in pixels.
        penalty: weight of what the method adds to the loss; None means its own.
        repeats: updates in a row from one batch; None means its own.
        options: of its attack, such as autocast, memory_format and compile.

    Attributes:
        attack: what a monitor looks with, and whose function the method climbs.
        weight: `penalty`, or the method's own.

    Raises:
        ValueError: eps is out of range.
    """

    OPTIONS: tuple[str, ...] = ()  # settings of its own that it heeds
    DEFAULTS: Mapping[str, float] = {}  # of other settings, where they are not given
    REFUSES: Mapping[str, str] = {  # settings that it cannot heed, and why
        "eps_schedule": "what it keeps from update to update is of one budget",
    }
    WEIGHT: float | None = None
    REPEATS = 1
    compares = False  # whether the update sees the images at the start too, and `distances` adds to the loss
    sees_gradient = False  # whether `seen` gets the update's own gradient with respect to the images

    def __init__(
        self, model: nn.Module, eps: float, *, penalty: float | None = None, repeats: int | None = None, **options
    ):
        check_eps(eps, "Linf")
        self.model, self.eps = model, eps
        self.weight = self.WEIGHT if penalty is None else penalty
        self.repeats = self.REPEATS if repeats is None else repeats
        self.attack = self.looks(model, eps, **options)

    def looks(self, model: nn.Module, eps: float, **options) -> Attack:
        """The attack that a monitor looks with."""
        return FGSM(model, eps, **options)

    def open(
        self,
        count: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        augment: Augment | None = None,
        folder: Path | None = None,
        resume: bool = False,
    ) -> None:
        """Make what it keeps of each of `count` images, (C, H, W) of `dtype`, which `augment` changes: in files of
        `folder` if there is one; with `resume` those that are there."""

    def begin(self, number: int, epoch: int, epochs: int) -> None:
        """Before an update: how many updates of the stage there were, which epoch of how many of the stage it is."""

    def attacked(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
        moves: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The images to learn from, new and detached, and where it `compares` those at the start, (N, ...) each.

        Args:
            images: (N, ...) floats in [0, 1]; labels: int64 (N,).
            seeds: int64 (N,), of each sample's draws; rows: int64 (N,), the images' numbers; moves: int64 (N,), the
                seeds of their augmentation, None without one.
        """
        raise NotImplementedError

    def distances(self, logits: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """What each sample adds to its loss, (N,), from the logits (N, C) of what `attacked` returned."""
        raise NotImplementedError

    def learn(self, labels: torch.Tensor, parameters: Sequence[torch.Tensor], scale: float) -> torch.Tensor | float:
        """Add gradients of something else than the update's loss, times `scale`, to the parameters'; that, scaled."""
        return 0.0

    def seen(self, gradient: torch.Tensor) -> None:
        """The update's gradient of each sample's own loss with respect to the images learnt from."""

    def end(self) -> None:
        """After the update's step."""

    def flush(self) -> None:
        """Have on the disk what is kept in files."""

    def state(self) -> dict[str, torch.Tensor]:
        """What is kept from update to update, by name; `load` takes it back exactly."""
        return {}

    def load(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Go on from `state()`, on this device."""


def gradient_at(attack: Attack, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Gradient of each sample's loss with respect to the pixels, (N, ...), float32 at least.

    The model is as the attack has it: frozen, in eval mode. The images (N, ...), floats, may be beyond the box.
    """
    with torch.inference_mode(False), torch.no_grad(), frozen(attack.model, attack.training_mode):
        slots = attack.slots(images, labels, attack.eps, None)
        slots.adv = images
        attack.show(slots)
        gradient, _, _ = attack.objective.gradient(slots.input, labels)
        return attack.in_pixels(gradient)
