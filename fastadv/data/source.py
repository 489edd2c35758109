"""A data set where it lies: its parts as they were found, nothing decoded yet."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastadv.data.pictures import Picture


@dataclass(frozen=True)
class Part:
    """Images as a tensor (N, C, H, W) or as encoded pictures, and labels int64 (N,)."""

    images: torch.Tensor | list[Picture]
    labels: torch.Tensor

    def take(self, index: torch.Tensor) -> "Part":
        if isinstance(self.images, torch.Tensor):
            return Part(self.images[index], self.labels[index])
        return Part([self.images[i] for i in index.tolist()], self.labels[index])


@dataclass(frozen=True)
class Source:
    """Parts by name: "train", and "val" and "test" where the set has them; a name for each class."""

    parts: dict[str, Part]
    classes: tuple[str, ...]


def joined(parts: Sequence[Part]) -> Part:
    """Parts of encoded pictures, one after the other."""
    return Part([picture for part in parts for picture in part.images], torch.cat([part.labels for part in parts]))
