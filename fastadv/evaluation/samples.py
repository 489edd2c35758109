"""The samples of an evaluation: all of them, checked."""

from collections.abc import Iterable, Mapping
from typing import Any, overload

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastadv.attacks.checks import SLACK, check_device, check_samples, device_of
from fastadv.attacks.normalized import denormalized
from fastadv.data.share import Batch, Samples, Share
from fastadv.functional import Normalization
from fastadv.nn.frozen import as_normal
from fastadv.nn.logits import AnyModel

BATCH = 256  # samples of a Dataset at a time
IMAGES = ("images", "image", "pixel_values", "img")  # keys of batches that are dicts
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
    """All images of a pair or of batches, where they are, and all labels.

    Floats that rounding put up to 1e-6 beyond the box are put back.

    Args:
        data: as of `evaluate`.
        model: that is evaluated.
        device: of the labels; None means the model's.
        normalization: that was applied to the images; they are made pixels again. None: they are pixels.

    Returns:
        Images (N, ...), floats in [0, 1] or uint8, or a `Share` of such where `data` has one; labels int64 (N,), or
        (N, C) of several a sample.

    Raises:
        TypeError: `data` is something else; images are neither floats nor uint8, or labels are not int64.
        ValueError: there are none, their shapes or values cannot be, or `device` is not the model's.
    """
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
        except TypeError as error:  # pictures that are no tensors yet
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
    return as_tensors(images, labels, model)


def as_tensors(images: object, labels: object, model: AnyModel) -> tuple[Any, Any]:
    """NumPy arrays as tensors, anything else as it is.

    NumPy's own dtypes say nothing of what is meant: it computes in float64, and has integers of every size. So images
    in float64 get the dtype of the model's weights, and integer labels are int64.

    Args:
        images: of any type.
        labels: of any type.
        model: that takes the images.
    """
    found, named = as_tensor(images), as_tensor(labels)
    if isinstance(images, np.ndarray) and found.dtype == torch.float64:
        found = found.to(next((p.dtype for p in _parameters(model) if p.is_floating_point()), torch.float64))
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        named = named.long()
    return found, named


def as_tensor(value: object) -> Any:
    """A NumPy array as a tensor, anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(np.require(value, requirements=("C", "W")))  # torch takes no other without a word


def _parameters(model: AnyModel) -> Iterable[torch.Tensor]:
    return model.parameters() if isinstance(model, nn.Module) else ()


def _in_the_box(images: torch.Tensor) -> torch.Tensor:
    if not images.is_floating_point() or not images.numel():
        return images
    low, high = torch.stack(images.aminmax()).tolist()
    if -SLACK <= low and high <= 1 + SLACK and not 0 <= low <= high <= 1:
        return images.clamp(0, 1)
    return images
