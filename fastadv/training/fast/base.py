"""The base class of training attacks: they do more in a training step than to make its images."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastadv.attacks import FGSM, Attack
from fastadv.attacks.checks import check_eps
from fastadv.nn.frozen import frozen
from fastadv.training.augment import Augment
from fastadv.training.memory import SampleMemory
from fastadv.training.settings import Settings, in_limits


@dataclass(frozen=True)
class Epoch:
    """The facts about an epoch that a training attack gets before it.

    Attributes:
        number: the number of the epoch, counted over all stages, from 0.
        settings: the settings of the run.
        shape: (C, H, W) of a training image.
        dtype: the dtype of a training image.
        augment: the augmentation; None means none.
        memory: called with a name and the shape and dtype of a row, it returns the rows that are kept for each training
            image from epoch to epoch. They outlast a stage, but not a switch to another attack.
    """

    number: int
    settings: Settings
    shape: Sequence[int]
    dtype: torch.dtype
    augment: Augment | None
    memory: Callable[[str, Sequence[int], torch.dtype], SampleMemory]


class FastMethod:
    """A training attack, which a `TrainStep` takes in place of an attack. Each subclass is a row of the table `FAST`.

    A run calls its methods in this order:

        begin_epoch                                  before an epoch
            begin                                    before an update
                attacked, learn, distances, seen     for each part of its batch
            end                                      after the update

    Beside weights, images and seeds, an update depends on `state` and on the epoch's `memory` alone.

    Args:
        model: from images in [0, 1] to logits.
        eps: the radius of the ball, in the images' units, [0, 1].
        penalty: the weight of the term that the training attack adds to the loss; None means its own weight.
        repeats: how many updates in a row use the same batch; None means its own number.
        options: options of `attack`, such as autocast, memory_format and compile.

    Attributes:
        attack: the attack whose loss the training attack increases, and which the monitor uses. Where a schedule of the
            budget is supported, the run sets it to the attack with the present budget, and to None where that is 0.
        weight: `penalty`, or its own weight.
        around_passes: makes the context in which the attack runs the model. A `TrainStep` sets it to one with the
            factors of LoRA merged into the weights.

    Raises:
        TypeError: a number is of a wrong type.
        ValueError: a number is out of range.
    """

    OPTIONS: tuple[str, ...] = ()  # the names of its own settings
    DEFAULTS: Mapping[str, float] = {}  # its defaults of other settings
    REFUSES: Mapping[str, str] = {  # {setting that it does not support: why}
        "eps_schedule": "what it weighs, or keeps from update to update, is of one budget",
    }
    WEIGHT = 0.0  # the default of penalty
    REPEATS = 1  # the default of repeats
    alone = True  # whether it trains in a single process only
    compares = False  # whether the update also sees the images at the start, and `distances` adds to the loss
    by_epochs = False  # whether an update depends on how many epochs the stage has
    sees_gradient = False  # whether `seen` gets the update's gradient with respect to the images

    def __init__(
        self, model: nn.Module, eps: float, *, penalty: float | None = None, repeats: int | None = None, **options: Any
    ):
        check_eps(eps, "Linf")
        self.model, self.eps = model, eps
        self.weight: float = self.WEIGHT if penalty is None else in_limits("penalty", penalty)
        self.repeats: int = self.REPEATS if repeats is None else in_limits("repeats", repeats)
        self.attack: Attack = self.looks(model, eps, **options)
        self.around_passes: Callable[[], AbstractContextManager[None]] = nullcontext
        self._begun: set[str] = set()  # the names of those of `begin_epoch` and `begin` that were called

    def looks(self, model: nn.Module, eps: float, **options: Any) -> Attack:
        """The attack that the monitor uses. Arguments as of the constructor."""
        return FGSM(model, eps, **options)

    def check(self, name: str, settings: Settings) -> None:
        """Refuse settings that the attack does not support.

        Args:
            name: the name of the attack, for the errors.
            settings: the settings of the run.

        Raises:
            ValueError: there is such a setting.
        """
        for setting, why in self.REFUSES.items():
            if getattr(settings, setting) not in (getattr(Settings, setting), 0):
                raise ValueError(f"{setting} is not for {name}: {why}. Leave it out")
        self.check_loss(name, settings.clean_weight, settings.label_smoothing or 0.0)
        for stage in settings.stages:
            if stage.epochs < self.repeats:
                raise ValueError(
                    f"{name} learns from each batch {self.repeats} times, and passes the images epochs / "
                    f"{self.repeats} times: {stage.epochs} epochs of {stage.method} are less than one pass. Take "
                    f"{self.repeats} or more, or fewer repeats"
                )

    def check_loss(self, name: str, clean_weight: float, label_smoothing: float) -> None:
        """Refuse a loss whose gradient is no attack, where the attack follows the gradient of the update's loss.

        Args:
            name: the name of the attack, for the errors.
            clean_weight: the share of the loss on clean images.
            label_smoothing: of the loss.

        Raises:
            ValueError: the attack cannot follow that loss.
        """
        if not self.sees_gradient:
            return
        if clean_weight == 1:
            raise ValueError(
                f"{name} follows the gradient of the loss on attacked images, and clean_weight=1 leaves these out: "
                "take a smaller one"
            )
        if label_smoothing:
            raise ValueError(
                f"{name} follows the gradient of the update's loss, and label_smoothing turns that towards the label "
                "wherever the model is sure of it: the attack would help the model. Leave label_smoothing out"
            )

    def check_model(self, name: str, settings: Settings, images: torch.Tensor) -> None:
        """Refuse a model that the attack cannot train. The model is not changed.

        Args:
            name: the name of the attack, for the errors.
            settings: the settings of the run.
            images: two of the training images, (2, C, H, W), floats on the model's device.

        Raises:
            ValueError: the attack cannot train this model.
        """

    def begin_epoch(self, epoch: Epoch) -> None:
        """Called before an epoch, or before the rest of an epoch that was cut."""
        self._begun.add("begin_epoch")

    def begin(self, number: int, epoch: int, epochs: int) -> None:
        """Called before an update.

        Args:
            number: the number of the update in the stage, from 0.
            epoch: the number of the epoch in the stage, from 0.
            epochs: how many epochs the stage has.
        """
        self._begun.add("begin")

    def check_begun(self) -> None:
        """Refuse an update before `begin_epoch` and `begin`, where the attack does something in them.

        Raises:
            RuntimeError: the caller has called neither, or one of them.
        """
        for name, when in (("begin_epoch", "epoch"), ("begin", "update")):
            if name not in self._begun and getattr(type(self), name) is not getattr(FastMethod, name):
                raise RuntimeError(
                    f"the training attack {type(self).__name__} was not begun: call its {name} before each {when}"
                )

    def attacked(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
        moves: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The attacked images of a part of the batch.

        Args:
            images: (N, ...), floats in [0, 1].
            labels: int64 (N,).
            seeds: int64 (N,), the seed of each sample's random numbers.
            rows: int64 (N,), the numbers of the images.
            moves: int64 (N,), the seeds of the images' augmentation; None without one.

        Returns:
            The images (N, ...) to learn from, new and detached. An attack that `compares` also returns the images at
            its start. An attack that overrides `outputs` may return other inputs for it.
        """
        raise NotImplementedError

    def fresh(self, images: torch.Tensor, labels: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """The images of `attack`; shapes as of `attacked`."""
        with self.around_passes():
            return self.attack(images, labels, seed=seeds)

    def gradient_at(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The gradient of each sample's loss with respect to the pixels.

        The model is frozen and in eval mode, as during an attack.

        Args:
            images: floats (N, ...), which may be beyond [0, 1].
            labels: int64 (N,).

        Returns:
            (N, ...), float32 or float64.
        """
        attack, inference = self.attack, torch.inference_mode(False)
        with self.around_passes(), inference, torch.no_grad(), frozen(attack.model, attack.training_mode):
            slots = attack.slots(images, labels, attack.eps, None)
            slots.adv = images
            attack.show(slots)
            gradient, _, _ = attack.objective.gradient(slots.input, labels)
            return attack.in_pixels(gradient)

    def outputs(self, through: Callable[[torch.Tensor], object], inputs: torch.Tensor) -> object:
        """The outputs for the update's loss.

        Args:
            through: the model, which may be under DistributedDataParallel.
            inputs: (n, ...), inputs that `attacked` returned.
        """
        return through(inputs)

    def distances(self, logits: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The term that the attack adds to each sample's loss.

        Args:
            logits: (N, C), of the attacked images.
            start: (N, C), the logits of the images at the start of the attack.

        Returns:
            (N,).
        """
        raise NotImplementedError

    def learn(self, labels: torch.Tensor, parameters: Sequence[torch.Tensor], scale: float) -> torch.Tensor | float:
        """Add the gradients of a penalty to the gradients of the parameters.

        Args:
            labels: int64 (N,), of the images that `attacked` got last.
            parameters: the parameters that train.
            scale: a factor of the penalty.

        Returns:
            The penalty times `scale`: a 0-dim tensor, or 0.0 without a penalty.
        """
        return 0.0

    def seen(self, gradient: torch.Tensor) -> None:
        """Called with the update's gradient of each sample's loss with respect to the attacked images, (N, ...)."""

    def end(self) -> None:
        """Called after the step of an update."""
        self._begun.discard("begin")

    def facts(self) -> dict[str, float]:
        """The attack's entries in the record of an epoch, after its last update."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors, by name, that are kept from update to update; `load` takes them."""
        return {}

    def load(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Continue from a state that `state()` returned, on this device."""


def needed(rows: torch.Tensor | None) -> torch.Tensor:
    """The images' numbers, for an attack that keeps numbers of each image.

    Raises:
        ValueError: `rows` is None.
    """
    if rows is None:
        raise ValueError("the attack keeps something of each image: give rows=, the images' numbers")
    return rows
