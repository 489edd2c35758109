"""Checks for NaN and infinity before a step is taken, and before weights are saved."""

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch.nn.utils import get_total_norm


def inexact(tensor: torch.Tensor) -> bool:
    """Whether a tensor may hold NaN, infinity and means: real or complex, but no integers."""
    return tensor.is_floating_point() or tensor.is_complex()


def largest(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The largest magnitude in some tensors, 0-dim on `device`, without waiting for the device.

    Args:
        tensors: the tensors, on any device; integers do not count.
        device: the device of the result.

    Returns:
        0-dim float; NaN where a tensor has a NaN.
    """
    held = [numbers for numbers in map(_numbers, tensors) if inexact(numbers) and numbers.numel()]
    return get_total_norm(held, float("inf")).to(device)


def nonfinite(tensors: Mapping[str, torch.Tensor], known: Collection[str] = ()) -> list[str]:
    """The names of the tensors with NaN or infinity, without those that are `known` to have some."""
    unknown = {name: tensor for name, tensor in tensors.items() if name not in known}
    return [name for name, t in unknown.items() if inexact(t) and not bool(_numbers(t).isfinite().all())]


def in_8_bits(tensor: torch.Tensor) -> bool:
    """Whether a tensor has floats in 8 bits: of these PyTorch has neither isfinite nor arithmetic."""
    return tensor.is_floating_point() and tensor.itemsize == 1


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor that are kept; a sparse one keeps few."""
    if tensor.layout == torch.strided:
        return tensor.float() if in_8_bits(tensor) else tensor
    return (tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor).values()


def nonfinite_groups(groups: Mapping[str, Mapping[str, torch.Tensor] | None], known: Collection[str] = ()) -> list[str]:
    """As `nonfinite` for groups: names such as "optimizer 0.exp_avg". A group that is None is not checked."""
    return [f"{group} {name}" for group, part in groups.items() for name in nonfinite(part or {}, known)]


def fault(loss: float, norm: float, statistics: float) -> tuple[str, str]:
    """The cause of a step that is not finite, and advice, in words.

    Args:
        loss: the loss of the step.
        norm: the norm of the gradient.
        statistics: the largest magnitude in the buffers that the forward pass wrote.

    Returns:
        (the cause, advice to add to the message, which may be empty).
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}", ""
    if not math.isfinite(norm):
        found = f"the gradient is not finite (its norm is {norm}, the loss is {loss:g})"
        return found, ". Where it is so from the start, the model has no derivative, as a square root has none at 0"
    return f"a buffer of the model, such as batch-norm's statistics, reached {statistics}", ""
