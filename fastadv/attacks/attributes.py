"""The attributes of an attack that its parts, in several files, use."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fastadv.attacks.losses import LossFunction
from fastadv.attacks.objective import Objective
from fastadv.attacks.watch import Watch
from fastadv.functional import Normalization
from fastadv.nn.logits import AnyModel

TargetFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From (images in pixels, labels) to the targets, int64 (N,)."""
Clip = tuple[float, float] | None


class Attributes(ABC):
    """The attributes of an `Attack`, which documents and sets them. Its parts derive from here, to be typed alone."""

    model: AnyModel
    norm: str
    eps: float
    alpha: float | torch.Tensor | None
    targeted: bool | str | TargetFunction
    kth_min: int
    loss: str | LossFunction
    target_classes: int
    restarts: int
    training_mode: str
    compile: bool
    clip: Clip
    images_normalized: tuple[Any, Any] | None
    objective: Objective
    _normalization: Normalization | None
    _watch: Watch  # made again where the attacked function is
    _told: set[str]  # alpha / eps where the steps are short of eps, each warned of once

    if TYPE_CHECKING:  # an attack has them as attributes or as properties

        @property
        def steps(self) -> int: ...

        @property
        def draws(self) -> bool: ...

        @property
        def by_age(self) -> bool: ...

        @property
        def compares(self) -> str: ...

        def factors(self) -> list[float]: ...

    else:
        steps = 1
        draws = False  # whether it needs a seed
        by_age = False  # whether its steps depend on the slots' `age` and `restart`

    @abstractmethod
    def __call__(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Adversarial images."""

    @abstractmethod
    def _seen_by_model(self, adv: torch.Tensor) -> torch.Tensor:
        """The model's input for images."""

    @abstractmethod
    def _clean_logits(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of clean images."""
