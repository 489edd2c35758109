"""Collects and checks the samples of an evaluation."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from fastadv.attacks.checks import SLACK, check_device, check_samples, device_of
from fastadv.attacks.normalized import denormalized
from fastadv.data.common import image_hashes
from fastadv.data.share import Batch, Samples, Share
from fastadv.devices import present
from fastadv.functional import Normalization
from fastadv.nn.frozen import as_normal
from fastadv.nn.inside import as_module
from fastadv.nn.logits import AnyModel
from fastadv.ops.generator import seeded

LOOKED_AT = 8  # images of a data set that are read twice
BATCH = 256  # samples that are read from a Dataset at a time
IMAGES = ("images", "image", "pixel_values", "img")  # keys of the images where a batch is a dict
LABELS = ("labels", "label")
WANTED = (
    "data must be a pair (images, labels) of tensors or NumPy arrays, or a loader or Dataset of such pairs, or of "
    f"dicts with one of the keys {', '.join(IMAGES)} and one of {', '.join(LABELS)}"
)


AnyData = Batch | Iterable[Batch] | Dataset[Any]


@overload
def collected(
    data: Samples, model: AnyModel, device: torch.device | str | None, normalization: Normalization | None = None
) -> Samples: ...
@overload
def collected(
    data: AnyData, model: AnyModel, device: torch.device | str | None, normalization: Normalization | None = None
) -> Batch: ...
def collected(
    data: AnyData, model: AnyModel, device: torch.device | str | None, normalization: Normalization | None = None
) -> Batch:
    """All images and labels of a data set. The images stay on their device.

    Floats that are beyond [0, 1] by rounding alone, at most 1e-6, are clamped.

    Args:
        data: the samples, as `evaluate` takes them.
        model: the model that is evaluated.
        device: the device for the labels; None means the model's.
        normalization: the normalisation that was applied to the images, which is undone; None means none was.

    Returns:
        Images (N, ...), floats in [0, 1] or uint8, or a `Share` of them where `data` has one; and labels int64 (N,), or
        (N, C) where a sample has several.

    Raises:
        TypeError: `data` is something else; images are neither floats nor uint8; or labels are not int64.
        ValueError: there are no images; a shape or a value is wrong; or `device` is not here or not the model's.
    """
    device = None if device is None else present(device)
    given: Any = data
    if isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[0], Share):
        return _share_and_labels(given[0], given[1], model, device)
    batches = [_pair(batch, model) for batch in _batches(data)]
    if not sum(labels.numel() for _, labels in batches):
        raise ValueError("there are no images to evaluate")
    images, labels = (as_normal(part[0] if len(part) == 1 else torch.cat(part)) for part in zip(*batches, strict=True))
    images = _in_the_box(images if normalization is None else denormalized(images, normalization))
    check_samples(images, labels)
    labels = labels.to(device or device_of(model) or images.device)
    check_device(labels.device, model)
    return images, labels


def oddities(data: object, images: torch.Tensor | Share) -> list[str]:
    """What a loader or a Dataset does to the samples that an evaluation should not have, in sentences.

    Some images of the data set are read twice, with other seeds, to tell whether they are drawn anew each time.

    Args:
        data: the samples, as `evaluate` takes them.
        images: those that it gave.
    """
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset):
        workers = data.num_workers if isinstance(data, DataLoader) else 1
        if workers > 1 and isinstance(images, torch.Tensor) and len(set(image_hashes(images))) * workers <= len(images):
            return [
                f"each of the {workers} workers of the loader read all of the IterableDataset, and each image counts "
                f"{workers} times: share it out by torch.utils.data.get_worker_info(), or take num_workers=0"
            ]
        return []
    readable = isinstance(dataset, Dataset) or (isinstance(data, DataLoader) and hasattr(dataset, "__getitem__"))
    if not readable or not hasattr(dataset, "__len__"):
        return []
    found, size, count = [], len(dataset), len(images)
    if count < size:
        found.append(
            f"the loader gave {count} of the {size} samples of its data set: the others are in no figure. Does it have "
            "drop_last, or a sampler for a part?"
        )
    batches = getattr(data, "batch_sampler", None)
    sampler = getattr(batches, "sampler", None if batches is None else batches)
    given = _indices_of(sampler, size)
    again = given is not None and len(set(given)) < len(given)
    if again or getattr(sampler, "replacement", False):
        found.append("the loader draws with replacement: some images count several times, and others never")
    elif isinstance(sampler, (RandomSampler, SubsetRandomSampler)):
        found.append(
            "the loader shuffles: the lists of the report, one entry a sample, are in the order of this pass, as its "
            "labels are. Evaluate without shuffle for the data set's order"
        )
    if not given:
        return found
    rows = given[:: max(1, len(given) // LOOKED_AT)][:LOOKED_AT]
    readings = []
    for seed in (0, 1):
        with seeded(seed):
            readings.append([_image_in(dataset[row]) for row in rows])
    if not all(map(_same, *readings)):
        found.append(
            "the data set draws its images anew each time that they are read, as with augmentation: the accuracies are "
            "of one draw. Evaluate on images without random transforms"
        )
    return found


def _indices_of(sampler: object, size: int) -> Sequence[int] | None:
    """The indices that a sampler gives, in any order; None where to ask would draw them, or they are unknown."""
    if isinstance(sampler, (SequentialSampler, RandomSampler, type(None))):
        return range(size)
    given: Any = sampler.indices if isinstance(sampler, SubsetRandomSampler) else sampler
    known = isinstance(given, (list, tuple, range)) and all(isinstance(index, int) for index in given)
    return given if known else None


def _image_in(sample: Any) -> Any:
    """The image of one sample; None where a collate function makes it of something else."""
    if isinstance(sample, Mapping):
        return next((as_tensor(sample[name]) for name in IMAGES if name in sample), None)
    return as_tensor(sample[0]) if isinstance(sample, (tuple, list)) and sample else None


def _same(one: Any, other: Any) -> bool:
    """Whether two readings are equal, on any device and of any dtype; what is no tensor counts as equal."""
    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return not tensors or torch.equal(one, other)


def _share_and_labels(share: Share, labels: torch.Tensor, model: AnyModel, device: torch.device | str | None) -> Batch:
    mine = _in_the_box(as_normal(share.mine))
    if len(mine):
        check_samples(mine, labels[share.rows])
    labels = labels.to(device or device_of(model) or share.mine.device)
    check_device(labels.device, model)
    return (share if mine is share.mine else Share(mine, share.owners, share.team)), labels


def _batches(data: Any) -> Iterable[Any]:
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], (torch.Tensor, np.ndarray)):
        return [data]
    if isinstance(data, Mapping):
        return [data]
    if isinstance(data, Dataset):
        try:
            return list(DataLoader(data, BATCH))
        except TypeError as error:  # such as pictures that are not tensors yet
            raise TypeError(f"{WANTED}; its samples make no batch: {error}") from error
    if isinstance(data, (torch.Tensor, np.ndarray, str)) or not isinstance(data, Iterable):
        raise TypeError(f"{WANTED}; got a {type(data).__name__}")
    return data


def _pair(batch: Any, model: AnyModel) -> Samples:
    """One batch as a pair of tensors."""
    if isinstance(batch, Mapping):
        keys = [next((name for name in names if name in batch), None) for names in (IMAGES, LABELS)]
        if None in keys:
            raise TypeError(f"{WANTED}; got a dict with the keys {', '.join(map(str, batch))}")
        batch = [batch[key] for key in keys]
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)} entries" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(f"{WANTED}; got a batch that is a {type(batch).__name__}{size}")
    for name, part in zip(("images", "labels"), batch, strict=True):
        if not isinstance(part, (torch.Tensor, np.ndarray)):
            raise TypeError(f"{WANTED}; got {name} that are a {type(part).__name__}")
    images, labels = batch
    if labels.ndim == 0:
        raise TypeError(
            f"{WANTED}; got a label without dimensions, as of one sample: a DataLoader makes batches of them"
        )
    return as_tensors(images, labels, model)


def as_tensors(images: object, labels: object, model: AnyModel) -> tuple[Any, Any]:
    """NumPy arrays as tensors; anything else stays as it is.

    NumPy computes in float64 by default, and has integers of every size. So float64 images get the dtype of the model's
    weights, and integer labels become int64.

    Args:
        images: NumPy array or anything else.
        labels: NumPy array or anything else.
        model: the model that takes the images.

    Returns:
        (images, labels).
    """
    found, named = as_tensor(images), as_tensor(labels)
    if isinstance(images, np.ndarray) and found.dtype == torch.float64:
        found = found.to(next((p.dtype for p in _parameters(model) if p.is_floating_point()), torch.float64))
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        named = named.long()
    return found, named


def as_tensor(value: object) -> Any:
    """A NumPy array as a tensor; anything else stays as it is."""
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(np.require(value, requirements=("C", "W")))  # torch warns of other arrays


def _parameters(model: AnyModel) -> Iterable[torch.Tensor]:
    return as_module(model).parameters()


def _in_the_box(images: torch.Tensor) -> torch.Tensor:
    if not images.is_floating_point() or not images.numel():
        return images
    low, high = torch.stack(images.aminmax()).tolist()
    if -SLACK <= low and high <= 1 + SLACK and not 0 <= low <= high <= 1:
        return images.clamp(0, 1)
    return images
