"""The images of a cell: a data set as the model takes it, each part up to its limit, in a fixed order."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from fastadv import data, models
from fastadv.data.classes import class_list
from fastadv.data.share import Samples
from fastadv.data.trained import TrainedOn
from fastadv.preprocessing import Preprocessing
from fastadv.study.grid import DataSet, Images, Task

NAMED = ("digits", "cifar10")  # sets that are not found by a path


@dataclass(frozen=True)
class Parts:
    """What a cell trains and is judged on.

    Attributes:
        train: images and labels to train on.
        val: images and labels to choose weights on.
        test: images and labels that judge.
        classes: their names.
        contents: a digest of the whole set, whatever the limits.
        judged: a digest of the test images in their order, and of their labels.
        test_digests: of each test image's content, int64 (N,).
        trained_on: for the file of a model.
    """

    train: Samples
    val: Samples
    test: Samples
    classes: tuple[str, ...]
    contents: str
    judged: str
    test_digests: torch.Tensor
    trained_on: TrainedOn


def parts_of(task: Task, data_folder: Path | None) -> Parts:
    """The images of a cell; those of a few data sets are kept in memory.

    Args:
        task: which images.
        data_folder: of data sets with relative paths; None means the working folder.

    Raises:
        FileNotFoundError: as `fastadv.data.load`.
        ImportError: likewise.
        ValueError: likewise, or the data have a single class.
    """
    return _loaded(task.data, task.images, task.cell.model, data_folder)


def preprocessing_of(given: DataSet, model: str) -> Preprocessing | None:
    """The preprocessing of the images: the model's own, or else the one to the size that the data set asks for.

    Raises:
        ValueError: an unknown model, or one that has a size of its own where the data set has one too.
    """
    own = models.source(model).preprocessing
    if given.size is None:
        return own
    if own is not None:
        raise ValueError(
            f"the model {model} takes images of {own.size[0]} x {own.size[1]} pixels: leave out the size of "
            f"{given.name}"
        )
    return Preprocessing((given.size, given.size))


@lru_cache(maxsize=8)
def _loaded(given: DataSet, limits: Images, model: str, data_folder: Path | None) -> Parts:
    named = given.path in NAMED
    dataset = data.load(
        given.path if named else Path(data_folder or "", given.path),
        preprocessing=preprocessing_of(given, model),
        classes=None if given.classes is None else class_list(given.classes),
        validation=limits.validation,
        folder=data_folder,
        image_column=given.image_column,
        label_column=given.label_column,
        seed=limits.split_seed,
    )
    if len(dataset.classes) < 2:
        raise ValueError(f"{given.name} has a single class, {dataset.classes[0]}: there is nothing to tell apart")
    rows = {name: _chosen(len(getattr(dataset, name)[1]), getattr(limits, f"{name}_limit")) for name in dataset.digests}
    parts: dict[str, Samples] = {}
    for name, chosen in rows.items():
        images, labels = getattr(dataset, name)
        parts[name] = images[chosen], labels[chosen]
    digests = dataset.digests["test"][rows["test"]]
    whole = torch.cat([torch.stack((dataset.digests[name], getattr(dataset, name)[1]), 1) for name in rows])
    return Parts(
        **parts,
        classes=dataset.classes,
        contents=_hash(np.unique(whole.numpy(), axis=0)),
        judged=_hash(digests.numpy(), parts["test"][1].numpy()),
        test_digests=digests,
        trained_on=TrainedOn.of(dataset),
    )


def _chosen(count: int, limit: int | None) -> torch.Tensor | slice:
    """The first `limit` of a random order that is always the same; without a limit all, in their own order."""
    if limit is None:
        return slice(None)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


def _hash(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()
