"""Checks that no number is learnt from, or kept, that is not finite."""

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch.nn.utils import get_total_norm


def largest(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The largest magnitude in the tensors of floats, 0-dim on `device`, without waiting for it.

    NaN where one of them holds a NaN.
    """
    held = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return get_total_norm(held, float("inf")).to(device)


def nonfinite(tensors: Mapping[str, torch.Tensor], known: Collection[str] = ()) -> list[str]:
    """Names of the tensors that hold a number that is not finite, without those that are `known` to hold one."""
    unknown = {name: tensor for name, tensor in tensors.items() if name not in known}
    return [name for name, t in unknown.items() if t.is_floating_point() and not bool(t.isfinite().all())]


def nonfinite_groups(groups: Mapping[str, Mapping[str, torch.Tensor] | None], known: Collection[str] = ()) -> list[str]:
    """As `nonfinite` in groups of tensors: "group name"; a group that is None was looked at before."""
    return [f"{group} {name}" for group, part in groups.items() for name in nonfinite(part or {}, known)]


def fault(loss: float, norm: float, statistics: float) -> tuple[str, str]:
    """What is wrong with a step that is not finite, and what may be done about it.

    Args:
        loss: of the step.
        norm: of the gradient.
        statistics: the largest magnitude in the buffers that the forward pass wrote.

    Returns:
        Two texts; the second one is empty or begins with a full stop.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}", ""
    if not math.isfinite(norm):
        found = f"the gradient is not finite (its norm is {norm}, the loss is {loss:g})"
        return found, ". Where it is so from the start, the model has no derivative, as a square root has none at 0"
    return f"a buffer of the model, such as batch-norm's statistics, reached {statistics}", ""
