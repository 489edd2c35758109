"""Clean and robust accuracy under one attack."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from fastadv.attacks.state import frozen
from fastadv.data import to_float

Batch = tuple[torch.Tensor, torch.Tensor]


def robust_accuracy(
    model: Callable,
    data: Batch | Iterable[Batch],
    attack: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Share of images classified correctly as they are, and also after the attack.

    Args:
        model: any callable from images to logits (N, C); evaluated in eval mode, left as found.
        data: a pair (images, labels), cut into batches here, or an iterable of such batches. Images are
            floats in [0, 1] or uint8, labels int64 (N,).
        attack: any callable from (images, labels) to images.
        batch_size: for a pair.
        seed: of torch's generators while it runs, so that the result can be repeated; they are put back.
        device: where to move the batches; None leaves them where they are.

    Returns:
        {"clean_accuracy": ..., "robust_accuracy": ...}, each in [0, 1]; the second is never the larger.

    Raises:
        ValueError: there are no images.
    """
    clean = robust = count = 0
    with seeded(seed):
        for images, labels in _batches(data, batch_size):
            images, labels = images.to(device), labels.to(device)
            right = _is_right(model, to_float(images), labels)
            clean += right.sum()
            robust += (right & _is_right(model, attack(images, labels), labels)).sum()
            count += len(labels)
    if count == 0:
        raise ValueError("there are no images to evaluate")
    return {"clean_accuracy": float(clean) / count, "robust_accuracy": float(robust) / count}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators inside, give them back as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _batches(data: Batch | Iterable[Batch], batch_size: int) -> Iterable[Batch]:
    is_pair = isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], torch.Tensor)
    return zip(*(tensor.split(batch_size) for tensor in data), strict=True) if is_pair else data


def _is_right(model: Callable, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), frozen(model):
        return model(images).argmax(dim=1) == labels
