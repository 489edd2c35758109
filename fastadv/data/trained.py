"""A record of the pictures that a model was trained on, small enough for its file."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from fastadv.data.dataset import Data
from fastadv.data.splits import Split
from fastadv.files import check_format

FORMAT = 1
BITS = 20  # for each picture
HASHES = 14  # 20 log 2: about one new picture in 10,000 is taken for a known one
MOST_OVERLAP = 0.05  # of the images that judge a model may be training images
LEAST, MOST = 1 << 13, 1_000_000  # bits, so that a few pictures are told apart as well; pictures


@dataclass(frozen=True)
class TrainedOn:
    """How a model's data set was split, and a Bloom filter (Bloom 1970) of the contents of its training pictures.

    Attributes:
        split: how the set was split, which says what pictures of it are for the test.
        pictures: how many different pictures it was trained on.
        filter: the bits, packed; None where there were more than MOST pictures.
    """

    split: Split
    pictures: int
    filter: bytes | None = field(repr=False)  # kilobytes

    @classmethod
    def of(cls, dataset: Data) -> "TrainedOn":
        """The record of a training on `dataset`, from its split and the digests of its training pictures.

        Raises:
            ValueError: `fastadv.data.load` did not make the data set, which then has neither.
        """
        if dataset.split is None:
            raise ValueError("the data set does not say how it was split: make it by fastadv.data.load")
        contents = np.unique(dataset.digests["train"].numpy())
        if len(contents) > MOST:
            return cls(dataset.split, len(contents), None)
        bits = np.zeros(max(LEAST, BITS * len(contents)), bool)
        for places in _places(contents, len(bits)):
            bits[places] = True
        return cls(dataset.split, len(contents), np.packbits(bits).tobytes())

    def knows(self, digests: torch.Tensor) -> torch.Tensor:
        """Which contents were trained on; about one new content in 10,000 is taken for a known one.

        Args:
            digests: of the contents, int64 (N,).

        Returns:
            bool (N,).

        Raises:
            ValueError: there is no filter.
        """
        if self.filter is None:
            raise ValueError(f"the {self.pictures:,} training pictures are too many to be told apart from others")
        bits = np.unpackbits(np.frombuffer(self.filter, np.uint8), count=max(LEAST, BITS * self.pictures))
        return torch.from_numpy(np.logical_and.reduce([bits[places] for places in _places(digests.numpy(), len(bits))]))

    def to_json(self) -> dict[str, Any]:
        """The record as a dict that JSON can hold."""
        filter = None if self.filter is None else base64.b64encode(self.filter).decode()
        return {"format": FORMAT, "split": asdict(self.split), "pictures": self.pictures, "filter": filter}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainedOn":
        """The record that `to_json` made a dict of.

        Raises:
            ValueError: of a later format, or damaged.
        """
        try:
            check_format("what the file says of its training pictures", values["format"], FORMAT)
            split, pictures, text = Split(**values["split"]), values["pictures"], values["filter"]
            filter = None if text is None else base64.b64decode(text, validate=True)
            expected = (max(LEAST, BITS * pictures) + 7) // 8
        except (KeyError, TypeError, binascii.Error) as error:
            raise ValueError(f"what the file says of its training pictures is damaged: {error!r}") from error
        if filter is not None and len(filter) != expected:
            raise ValueError("what the file says of its training pictures is damaged: its filter has another length")
        return cls(split, pictures, filter)


def known(records: Sequence[TrainedOn], digests: torch.Tensor) -> int | None:
    """How many of the contents, digests int64 (N,), are in any of the records; None where that is not known."""
    filters = [record.knows(digests) for record in records if record.filter is not None]
    count = int(torch.stack(filters).any(0).sum()) if filters else 0
    return count if count or (records and len(filters) == len(records)) else None


def _places(contents: np.ndarray, bits: int) -> list[np.ndarray]:
    """HASHES bits for each content, from the two halves of its digest (Kirsch and Mitzenmacher 2006)."""
    halves = contents.view(np.uint64)
    first, second = halves & np.uint64(0xFFFFFFFF), (halves >> np.uint64(32)) | np.uint64(1)
    return [((first + np.uint64(i) * second) % np.uint64(bits)).astype(np.int64) for i in range(HASHES)]
