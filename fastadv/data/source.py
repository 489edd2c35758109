"""A data set where it lies: its parts as they were found, nothing decoded yet."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import torch

from fastadv.data.pictures import Picture
from fastadv.data.share import Share


@dataclass(frozen=True)
class Part:
    """Images as a tensor (N, C, H, W), a `Share` of one or encoded pictures, and labels int64 (N,).

    `digests` are of what each picture contains, int64 (N,): equal pictures have equal ones, whatever their names.
    """

    images: torch.Tensor | list[Picture] | Share
    labels: torch.Tensor
    digests: torch.Tensor | None = None

    def take(self, index: torch.Tensor) -> "Part":
        whole = isinstance(self.images, torch.Tensor)
        images = self.images[index] if whole else [self.images[i] for i in index.tolist()]
        return Part(images, self.labels[index], None if self.digests is None else self.digests[index])

    def digested(self) -> "Part":
        return self if self.digests is not None else replace(self, digests=digests(self.images))


@dataclass(frozen=True)
class Source:
    """Parts by name: "train", and "val" and "test" where the set has them; a name for each class."""

    parts: dict[str, Part]
    classes: tuple[str, ...]


def joined(parts: Sequence[Part]) -> Part:
    """Parts of encoded pictures, one after the other."""
    return Part([picture for part in parts for picture in part.images], torch.cat([part.labels for part in parts]))


def digests(images: torch.Tensor | list[Picture]) -> torch.Tensor:
    """Eight bytes for each picture's content, int64 (N,): of a file its bytes, of a tensor's images theirs."""
    if isinstance(images, torch.Tensor):
        hashed = map(digest, images.contiguous().numpy())
        return torch.from_numpy(np.fromiter(hashed, np.int64, len(images)))
    with ThreadPoolExecutor() as pool:
        hashed = pool.map(lambda picture: digest(picture.stored()), images)
        return torch.from_numpy(np.fromiter(hashed, np.int64, len(images)))


def digest(content: bytes | np.ndarray) -> int:
    """Eight bytes of a content, as a number of 64 bits."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)
