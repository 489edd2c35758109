"""A data set where it lies: its parts as they were found, nothing decoded yet."""

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from fastadv.data.pictures import CorruptPictureError, Picture
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
class DataSource:
    """Parts by name: "train", "val" and "test" where the set has them; a name for each class."""

    parts: dict[str, Part]
    classes: tuple[str, ...]


def judging(parts: Collection[str], judge: str | None) -> list[str]:
    """Which of the parts that are there are read.

    Args:
        judge: None: all, for training. "test": the test part, to judge a model by, and all where there is none. "all".
    """
    return ["test"] if judge == "test" and "test" in parts else list(parts)


def concatenated(parts: Sequence[Part]) -> Part:
    """Parts of encoded pictures, or of tensors, one after the other."""
    labels = torch.cat([part.labels for part in parts])
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0].images, torch.Tensor):
        return Part(torch.cat([part.images for part in parts]), labels)
    return Part([picture for part in parts for picture in part.images], labels)


def digests(images: torch.Tensor | list[Picture]) -> torch.Tensor:
    """Eight bytes for each picture's content, int64 (N,): of a file its bytes, of a tensor's images theirs.

    A picture without content, which no part will hold in the end, is known by its name.
    """
    if isinstance(images, torch.Tensor):
        hashed = map(digest, images.contiguous().numpy())
        return torch.from_numpy(np.fromiter(hashed, np.int64, len(images)))
    with ThreadPoolExecutor() as pool:
        hashed = pool.map(lambda picture: digest(_content(picture)), images)
        return torch.from_numpy(np.fromiter(hashed, np.int64, len(images)))


def _content(picture: Picture) -> bytes | np.ndarray:
    try:
        return picture.stored()
    except CorruptPictureError:  # by the part, the class and the file, wherever the set lies: no two are equal
        return os.fsencode(os.path.join(*Path(picture.name).parts[-3:]))


def digest(content: bytes | np.ndarray) -> int:
    """Eight bytes of a content, as a number of 64 bits."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)
