"""How images go through the model beside the steps: as they do in these."""

from dataclasses import dataclass

import torch

from fastadv.functional import to_float

STAGED = 16  # parts whose images an evaluation has on the device at a time


@dataclass(frozen=True)
class Passes:
    """What a step's memory and speed depend on, for the monitor, the evaluations and the backbone's measurement.

    part: images that go through the model at a time. autocast, memory_format, compile: as in `Attack`.
    """

    part: int
    autocast: torch.dtype | None = None
    memory_format: torch.memory_format | None = None
    compile: bool = False

    @property
    def attack(self) -> dict:
        """Options of an attack."""
        return {"autocast": self.autocast, "memory_format": self.memory_format, "compile": self.compile}

    @property
    def evaluation(self) -> dict:
        """Options of `evaluate`."""
        precision = {"autocast": self.autocast, "memory_format": self.memory_format}
        return {"batch_size": self.part, "pool": STAGED * self.part, **precision}

    def staged(self, images: torch.Tensor, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The images `rows`, as floats and laid out, on the device."""
        images = to_float(images[rows.to(images.device)].to(device))
        return images if self.memory_format is None else images.contiguous(memory_format=self.memory_format)

    def precision(self, device: torch.device) -> torch.autocast:
        """Around a forward pass that no attack runs."""
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)
