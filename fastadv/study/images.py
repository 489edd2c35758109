"""The images of a cell: a data set preprocessed for the model, each part cut to its limit, in a fixed order."""

import hashlib
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from fastadv import data, models
from fastadv._warnings import warn
from fastadv.data.classes import class_list
from fastadv.data.loading import check_one_digits
from fastadv.data.share import Samples
from fastadv.data.trained import TrainedOn
from fastadv.preprocessing import Preprocessing
from fastadv.study.grid import DataSet, Images, Task

NAMED = ("digits", "cifar10")  # data sets that have a name instead of a path


@dataclass(frozen=True)
class Parts:
    """The images of a cell.

    Attributes:
        train: images and labels to train on.
        val: images and labels to choose weights on.
        test: images and labels to judge the model on.
        classes: the names of the classes.
        contents: a digest of the whole data set, the same whatever the limits.
        order: a digest of the images to train on and to choose weights on, and their labels, in their order.
        judged: a digest of the test images and their labels, in their order.
        test_digests: int64 (N,), a digest of each test image's content.
        trained_on: the training images as a model's file names them.
        warnings: what was warned of when the set was loaded.
    """

    train: Samples
    val: Samples
    test: Samples
    classes: tuple[str, ...]
    contents: str
    order: str
    judged: str
    test_digests: torch.Tensor
    trained_on: TrainedOn
    warnings: tuple[str, ...]


def parts_of(task: Task, data_folder: Path | None) -> Parts:
    """The images of a cell. The last eight data sets stay in memory, and are warned of when they are loaded.

    Args:
        task: the cell, which names the data set and its limits.
        data_folder: where relative paths of data sets begin; None means the working folder.

    Raises:
        FileNotFoundError: as `fastadv.data.load`.
        ImportError: as `fastadv.data.load`.
        ValueError: as `fastadv.data.load`; or all images have one class.
    """
    return _loaded(task.data, task.images, task.cell.model, data_folder)


def preprocessing_of(given: DataSet, model: str) -> Preprocessing | None:
    """The preprocessing of the images: the model's own, or a resize to the size that the grid gives for the data set.

    Args:
        given: the data set as the grid has it.
        model: the name of the model.

    Returns:
        The preprocessing; None where neither has one.

    Raises:
        ValueError: the model is unknown; or the model has a size of its own, and the data set has one too.
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
    if given.path == "digits" and data_folder is not None:
        check_one_digits(data_folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = data.load(
            given.path if named else Path(data_folder or "", given.path),
            preprocessing=preprocessing_of(given, model),
            classes=None if given.classes is None else class_list(given.classes),
            validation=limits.validation,
            folder=data_folder if given.path == "cifar10" else None,
            image_column=given.image_column,
            label_column=given.label_column,
            seed=limits.split_seed,
        )
    for each in caught:
        warn(each.message)
    if len(dataset.classes) < 2:
        raise ValueError(f"{given.name} has a single class, {dataset.classes[0]}: there is nothing to tell apart")
    rows = {name: _chosen(len(getattr(dataset, name)[1]), getattr(limits, f"{name}_limit")) for name in dataset.digests}
    parts: dict[str, Samples] = {}
    for name, chosen in rows.items():
        images, labels = getattr(dataset, name)
        parts[name] = images[chosen], labels[chosen]
    digests = {name: dataset.digests[name][chosen] for name, chosen in rows.items()}
    whole = torch.cat([torch.stack((dataset.digests[name], getattr(dataset, name)[1]), 1) for name in rows])
    return Parts(
        **parts,
        classes=dataset.classes,
        contents=_hash(np.unique(whole.numpy(), axis=0)),
        order=_hash(*(t.numpy() for name in ("train", "val") for t in (digests[name], parts[name][1]))),
        judged=_hash(digests["test"].numpy(), parts["test"][1].numpy()),
        test_digests=digests["test"],
        trained_on=TrainedOn.of(dataset),
        warnings=tuple(str(each.message) for each in caught),
    )


def _chosen(count: int, limit: int | None) -> torch.Tensor | slice:
    """Which images are taken: the first `limit` of a random order that is always the same; without a limit all."""
    if limit is None:
        return slice(None)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


def _hash(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()
