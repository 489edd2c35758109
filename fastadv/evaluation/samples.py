"""The samples of an evaluation: all of them, checked, on one device."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from fastadv.attacks.state import as_normal

Batch = tuple[torch.Tensor, torch.Tensor]


def device_of(model: Callable) -> torch.device | None:
    """Where its parameters are; None where it has none."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((parameter.device for parameter in parameters), None)


def gathered(data: Batch | Iterable[Batch], device: torch.device | str | None) -> Batch:
    """All images and all labels of a pair or of batches, on `device`.

    Raises:
        TypeError: images are neither floats nor uint8, labels are not int64 (N,).
        ValueError: there are none, or values that cannot be.
    """
    is_pair = isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], torch.Tensor)
    batches = [data] if is_pair else list(data)
    if not sum(len(labels) for _, labels in batches):
        raise ValueError("there are no images to evaluate")
    images, labels = (as_normal(torch.cat(part)).to(device) for part in zip(*batches, strict=True))
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be a float or uint8 tensor, got {images.dtype}")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise TypeError(
            f"labels must be int64 (N,), one for each of images {tuple(images.shape)}, got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if labels.min() < 0:
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")
    if images.is_floating_point() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"images must be in [0, 1], got [{images.min():.4g}, {images.max():.4g}]: if they are normalised, pass "
            "them as they were before, and Normalized(model, mean, std) as the model"
        )
    return images, labels
