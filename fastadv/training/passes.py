"""How images go through the model outside of the steps: in the same way as in the steps."""

from dataclasses import dataclass
from typing import TypedDict

import torch

from fastadv.functional import to_float

STAGED = 16  # parts whose images an evaluation has on the device at a time


class AttackOptions(TypedDict):
    """Options of an `Attack` by name."""

    autocast: torch.dtype | None
    memory_format: torch.memory_format | None
    compile: bool


class EvaluationOptions(TypedDict):
    """Options of `evaluate` by name."""

    batch_size: int
    pool: int
    autocast: torch.dtype | None
    memory_format: torch.memory_format | None


@dataclass(frozen=True)
class Passes:
    """What memory and speed of a step depend on, for the monitor, the evaluations and the backbone's measurement.

    Attributes:
        part: images that go through the model at a time.
        autocast: dtype of torch.autocast, as in `Attack`.
        memory_format: of the images, as in `Attack`.
        compile: whether attacks run under torch.compile, as in `Attack`.
    """

    part: int
    autocast: torch.dtype | None = None
    memory_format: torch.memory_format | None = None
    compile: bool = False

    @property
    def attack(self) -> AttackOptions:
        """Options of an attack."""
        return {"autocast": self.autocast, "memory_format": self.memory_format, "compile": self.compile}

    @property
    def evaluation(self) -> EvaluationOptions:
        """Options of `evaluate`."""
        return {
            "batch_size": self.part,
            "pool": STAGED * self.part,
            "autocast": self.autocast,
            "memory_format": self.memory_format,
        }

    def staged(self, images: torch.Tensor, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The images numbered `rows` on the device, as floats and in the memory format."""
        images = to_float(images[rows.to(images.device)].to(device))
        return images if self.memory_format is None else images.contiguous(memory_format=self.memory_format)

    def precision(self, device: torch.device) -> torch.autocast:
        """The context of a forward pass that no attack runs."""
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)
