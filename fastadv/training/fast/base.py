"""Methods of adversarial training that are more than an attack and the loss at its result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastadv.attacks import FGSM, Attack
from fastadv.attacks.checks import check_eps
from fastadv.nn.frozen import frozen
from fastadv.training.augment import Augment
from fastadv.training.memory import SampleMemory
from fastadv.training.settings import Settings


@dataclass(frozen=True)
class Epoch:
    """What a training attack gets before an epoch.

    Attributes:
        number: counted over all stages, from 0.
        settings: of the run.
        shape: of a training image, (C, H, W).
        dtype: of a training image.
        augment: what changes the images; None means nothing.
        memory: from a name, and shape and dtype of a row, to the rows that are kept of all training images from epoch
            to epoch. They outlast a stage, but not a switch to another attack.
    """

    number: int
    settings: Settings
    shape: Sequence[int]
    dtype: torch.dtype
    augment: Augment | None
    memory: Callable[[str, Sequence[int], torch.dtype], SampleMemory]


class FastMethod:
    """A training attack, with a step of its own, for a `TrainStep`; a subclass is one of the table `FAST`.

    An epoch calls `begin_epoch`. An update calls `begin`, then for each part of its batch `attacked`, `learn`,
    `distances` and `seen`, and then `end`. Beside weights, images and seeds, an update depends on `state` and on the
    epoch's `memory` alone.

    Args:
        model: from images in [0, 1] to logits.
        eps: radius of the ball, in the images' units, [0, 1].
        penalty: weight of what it adds to the loss; None means its own.
        repeats: updates in a row from one batch; None means its own.
        options: of its attack, such as autocast, memory_format and compile.

    Attributes:
        attack: what a monitor looks with, and whose loss it climbs. Where it heeds a schedule of the
            budget, the run puts the attack with the current budget here, and None where the budget is 0.
        weight: `penalty`, or its own.

    Raises:
        ValueError: eps is out of range.
    """

    OPTIONS: tuple[str, ...] = ()  # settings of its own that it heeds
    DEFAULTS: Mapping[str, float] = {}  # of other settings, where they are not given
    REFUSES: Mapping[str, str] = {  # settings that it cannot heed, and why
        "eps_schedule": "what it weighs, or keeps from update to update, is of one budget",
    }
    WEIGHT = 0.0  # of its addition to the loss, where penalty is not given
    REPEATS = 1
    alone = True  # whether it trains in one process only
    compares = False  # whether the update sees the images at the start too, and `distances` adds to the loss
    sees_gradient = False  # whether `seen` gets the update's own gradient with respect to the images

    def __init__(
        self, model: nn.Module, eps: float, *, penalty: float | None = None, repeats: int | None = None, **options: Any
    ):
        check_eps(eps, "Linf")
        self.model, self.eps = model, eps
        self.weight: float = self.WEIGHT if penalty is None else penalty
        self.repeats = self.REPEATS if repeats is None else repeats
        self.attack: Attack = self.looks(model, eps, **options)

    def looks(self, model: nn.Module, eps: float, **options: Any) -> Attack:
        """The attack that a monitor looks with."""
        return FGSM(model, eps, **options)

    def check(self, name: str, settings: Settings) -> None:
        """Refuse settings that the attack cannot heed.

        Args:
            name: of the attack, for the errors.
            settings: of the run.

        Raises:
            ValueError: there is such a setting.
        """
        for setting, why in self.REFUSES.items():
            if getattr(settings, setting) != getattr(Settings, setting):
                raise ValueError(f"{setting} is not for {name}: {why}. Leave it out")
        if self.sees_gradient and settings.clean_weight == 1:
            raise ValueError(
                f"{name} follows the gradient of the loss on attacked images, and clean_weight=1 leaves these out: "
                "take a smaller one"
            )
        for stage in settings.stages:
            if stage.epochs < self.repeats:
                raise ValueError(
                    f"{name} learns from each batch {self.repeats} times, and passes the images epochs / "
                    f"{self.repeats} times: {stage.epochs} epochs of {stage.method} are less than one pass. Take "
                    f"{self.repeats} or more, or fewer repeats"
                )

    def check_model(self, name: str, settings: Settings, images: torch.Tensor) -> None:
        """Refuse a model that the attack cannot train. The model is left as it was.

        Args:
            name: of the attack, for the errors.
            settings: of the run.
            images: two of the training images, (2, C, H, W), floats on the model's device.

        Raises:
            ValueError: it is one.
        """

    def begin_epoch(self, epoch: Epoch) -> None:
        """Before an epoch, or what is left of it."""

    def begin(self, number: int, epoch: int, epochs: int) -> None:
        """Before an update.

        Args:
            number: how many updates of the stage there were before it.
            epoch: its epoch, counted from the stage's first, which is 0.
            epochs: of the stage.
        """

    def attacked(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
        moves: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The images to learn from, new and detached, and where it `compares` those at the start, (N, ...) each.

        An attack with `outputs` of its own may return what these take instead.

        Args:
            images: (N, ...) floats in [0, 1].
            labels: int64 (N,).
            seeds: int64 (N,), of each sample's draws.
            rows: int64 (N,), the images' numbers.
            moves: int64 (N,), the seeds of their augmentation; None without one.
        """
        raise NotImplementedError

    def outputs(self, through: Callable[[torch.Tensor], object], inputs: torch.Tensor) -> object:
        """The outputs that the update's loss is taken of.

        Args:
            through: the model, such as it is under DistributedDataParallel.
            inputs: (n, ...), what `attacked` returned.
        """
        return through(inputs)

    def distances(self, logits: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """What each sample adds to its loss, (N,), from the logits (N, C) of what `attacked` returned."""
        raise NotImplementedError

    def learn(self, labels: torch.Tensor, parameters: Sequence[torch.Tensor], scale: float) -> torch.Tensor | float:
        """Add the gradients of a penalty, beside the update's loss, to the gradients of the parameters.

        Args:
            labels: int64 (N,), of the images that `attacked` got last.
            parameters: those that train.
            scale: a factor of the penalty.

        Returns:
            The penalty times `scale`: 0-dim, or 0.0 without one.
        """
        return 0.0

    def seen(self, gradient: torch.Tensor) -> None:
        """The update's gradient of each sample's own loss with respect to the images learnt from."""

    def end(self) -> None:
        """After the update's step."""

    def facts(self) -> dict[str, float]:
        """What the record of an epoch says of the attack, after its last update."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """What is kept from update to update, by name; `load` takes it back exactly."""
        return {}

    def load(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Go on from `state()`, on this device."""


def needed(rows: torch.Tensor | None) -> torch.Tensor:
    """The images' numbers, for an attack that keeps something of each image.

    Raises:
        ValueError: they are not given.
    """
    if rows is None:
        raise ValueError("the attack keeps something of each image: give rows=, the images' numbers")
    return rows


def gradient_at(attack: Attack, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Gradient of each sample's loss with respect to the pixels, (N, ...), float32 at least.

    The model is as the attack has it: frozen, in eval mode.

    Args:
        attack: whose loss is taken.
        images: floats (N, ...), which may be beyond the box.
        labels: int64 (N,).
    """
    with torch.inference_mode(False), torch.no_grad(), frozen(attack.model, attack.training_mode):
        slots = attack.slots(images, labels, attack.eps, None)
        slots.adv = images
        attack.show(slots)
        gradient, _, _ = attack.objective.gradient(slots.input, labels)
        return attack.in_pixels(gradient)
