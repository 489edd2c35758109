"""The samples of an evaluation: all of them, checked."""

from collections.abc import Callable, Iterable

import torch

from fastadv.attacks.checks import check_device, check_samples, device_of
from fastadv.attacks.state import as_normal

Batch = tuple[torch.Tensor, torch.Tensor]


def gathered(data: Batch | Iterable[Batch], model: Callable, device: torch.device | str | None) -> Batch:
    """All images of a pair or of batches, where they are, and all labels, on `device`; None means the model's.

    Raises:
        TypeError: images are neither floats nor uint8, or labels are not int64.
        ValueError: there are none, their shapes or values cannot be, or `device` is not the model's.
    """
    is_pair = isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], torch.Tensor)
    batches = [data] if is_pair else list(data)
    if not sum(len(labels) for _, labels in batches):
        raise ValueError("there are no images to evaluate")
    images, labels = (as_normal(torch.cat(part)) for part in zip(*batches, strict=True))
    check_samples(images, labels)
    labels = labels.to(device or device_of(model) or images.device)
    check_device(labels.device, model)
    return images, labels
