"""How the monitor and the evaluations of a run call the model: with the batch size and precision of the steps."""

from dataclasses import dataclass
from typing import TypedDict

import torch

from fastadv.functional import to_float

STAGED = 16  # an evaluation has the images of 16 parts on the device at a time


class AttackOptions(TypedDict):
    """Keyword arguments of an `Attack`."""

    autocast: torch.dtype | None
    memory_format: torch.memory_format | None
    compile: bool


class EvaluationOptions(TypedDict):
    """Keyword arguments of `evaluate`."""

    batch_size: int
    pool: int
    autocast: torch.dtype | None
    memory_format: torch.memory_format | None


@dataclass(frozen=True)
class Passes:
    """The settings of a pass through the model, for the monitor, the evaluations and the backbone's measurement.

    With the settings of the training step these need no more memory than the step, and are as fast.

    Attributes:
        part: the number of images that go through the model at a time.
        autocast: the dtype of torch.autocast, as in `Attack`.
        memory_format: the memory format of the images, as in `Attack`.
        compile: whether attacks run under torch.compile, as in `Attack`.
    """

    part: int
    autocast: torch.dtype | None = None
    memory_format: torch.memory_format | None = None
    compile: bool = False

    @property
    def attack(self) -> AttackOptions:
        """The keyword arguments of an attack."""
        return {"autocast": self.autocast, "memory_format": self.memory_format, "compile": self.compile}

    @property
    def evaluation(self) -> EvaluationOptions:
        """The keyword arguments of `evaluate`."""
        return {
            "batch_size": self.part,
            "pool": STAGED * self.part,
            "autocast": self.autocast,
            "memory_format": self.memory_format,
        }

    def staged(self, images: torch.Tensor, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The images numbered `rows`, int64 (n,), on the device, as floats in the memory format."""
        images = to_float(images[rows.to(images.device)].to(device))
        return images if self.memory_format is None else images.contiguous(memory_format=self.memory_format)
