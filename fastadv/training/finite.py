"""What is looked at so that no number that is not finite is learnt, or kept."""

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch.nn.utils import get_total_norm


def largest(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The largest magnitude in tensors of floats, 0-dim on `device`, NaN where there is one; nothing waits for it."""
    held = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return get_total_norm(held, float("inf")).to(device)


def nonfinite(tensors: Mapping[str, torch.Tensor], known: Collection[str] = ()) -> list[str]:
    """Names of the tensors that hold a number that is not finite, but for those that are `known` to."""
    unknown = {name: tensor for name, tensor in tensors.items() if name not in known}
    return [name for name, t in unknown.items() if t.is_floating_point() and not bool(t.isfinite().all())]


def nonfinite_groups(groups: Mapping[str, Mapping[str, torch.Tensor] | None], known: Collection[str] = ()) -> list[str]:
    """The same of groups of tensors, each with the name of its group; a group that is None was looked at before."""
    return [f"{group} {name}" for group, part in groups.items() for name in nonfinite(part or {}, known)]


def fault(loss: float, norm: float, statistics: float) -> tuple[str, str]:
    """What is wrong with a step that is not finite, and what may be done about it, in words.

    Args:
        norm: of the gradient; statistics: the largest magnitude in what the forward pass wrote to the model.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}", ""
    if not math.isfinite(norm):
        found = f"the gradient is not finite (its norm is {norm}, the loss is {loss:g})"
        return found, ". Where it is so from the start, the model has no derivative, as a square root has none at 0"
    return f"a buffer of the model, such as batch-norm's statistics, reached {statistics}", ""
