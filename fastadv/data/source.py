"""A data set before it is decoded: its parts, and digests of their images."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from fastadv.data.pictures import CorruptPictureError, Picture
from fastadv.functional import to_float

Images = torch.Tensor | list[Picture]  # (N, C, H, W), or N pictures that are not decoded yet
AnyPart = TypeVar("AnyPart", bound="Part")


@dataclass(frozen=True)
class Part:
    """Images and their labels.

    Attributes:
        images: a tensor (N, C, H, W), or encoded pictures.
        labels: int64 (N,).
    """

    images: Images
    labels: torch.Tensor

    def take(self: AnyPart, index: torch.Tensor) -> AnyPart:
        """The samples of the numbers `index`, int64 (n,)."""
        whole = self.images
        images = whole[index] if isinstance(whole, torch.Tensor) else [whole[i] for i in index.tolist()]
        return replace(self, images=images, labels=self.labels[index])

    def digested(self) -> "DigestedPart":
        """The part with the digests of its images; they are read for it."""
        return DigestedPart(self.images, self.labels, digests(self.images))


@dataclass(frozen=True)
class DigestedPart(Part):
    """A part with a digest of each image.

    Attributes:
        digests: of the images' contents, int64 (N,); equal images have equal ones, whatever their names.
    """

    digests: torch.Tensor

    def take(self: "DigestedPart", index: torch.Tensor) -> "DigestedPart":
        return replace(super().take(index), digests=self.digests[index])

    def digested(self) -> "DigestedPart":
        return self


@dataclass(frozen=True)
class DataSource:
    """A data set that is found and not decoded yet.

    Attributes:
        parts: by name: "train", and "val" and "test" where the set has them.
        classes: a name for each class.
    """

    parts: Mapping[str, Part]
    classes: tuple[str, ...]


def judging(parts: Collection[str], judge: str | None) -> list[str]:
    """Which of a set's parts are read.

    Args:
        parts: names of the parts that are there.
        judge: None: all, for training. "test": the test part, to judge a model by, and all where there is none. "all".
    """
    return ["test"] if judge == "test" and "test" in parts else list(parts)


def concatenated(parts: Sequence[Part]) -> Part:
    """Parts of encoded pictures, or of tensors, one after the other."""
    labels = torch.cat([part.labels for part in parts])
    if len(parts) == 1:
        return parts[0]
    tensors = [part.images for part in parts if isinstance(part.images, torch.Tensor)]
    if tensors:
        if len({images.dtype for images in tensors}) == 1:
            return Part(torch.cat(tensors), labels)
        # Uint8 among floats: an image is known by what it was, as a model that was trained on its part knows it.
        contents = torch.cat([digests(images) for images in tensors])
        return DigestedPart(torch.cat([to_float(images) for images in tensors]), labels, contents)
    return Part([picture for part in parts for picture in part.images], labels)


def digests(images: Images) -> torch.Tensor:
    """Eight bytes for each picture's content, int64 (N,): of a file its bytes, of a tensor's images theirs.

    A picture without content, which no part will hold in the end, is known by its name.
    """
    if isinstance(images, torch.Tensor):
        return _collected((digest(image.data) for image in images.contiguous().numpy()), len(images))
    with ThreadPoolExecutor() as pool:
        return _collected(pool.map(lambda picture: digest(_content(picture)), images), len(images))


def _collected(values: Iterable[int], count: int) -> torch.Tensor:
    return torch.from_numpy(np.fromiter(values, np.int64, count))


def _content(picture: Picture) -> bytes | memoryview:
    try:
        content = picture.stored()
        return content if isinstance(content, bytes) else content.data
    except CorruptPictureError:  # by the part, the class and the file, wherever the set lies: no two are equal
        return os.fsencode(os.path.join(*Path(picture.name).parts[-3:]))


def digest(content: bytes | memoryview) -> int:
    """Eight bytes of a content, as a number of 64 bits."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)
