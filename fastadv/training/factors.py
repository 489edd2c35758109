"""What LoRA and IA3 share: factors beside a layer's weight, by peft, that are merged into it at the end."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastadv.models.added import added_to
from fastadv.nn.frozen import at_the_end

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner


def pattern(names: Collection[str]) -> str:
    """These names as peft takes them: it matches a pattern as a whole, but a list by endings."""
    return "|".join(map(re.escape, names))


def check_targets(model: nn.Module, names: Sequence[str], method: str, todo: str) -> None:
    """Refuse layers whose weight is not theirs alone, or whose output an adapter changes.

    Raises:
        ValueError: there is one.
    """
    # Each place that holds a weight: two layers may have one weight, and one layer may be in two places.
    held = [(name, key, child) for name, module in model.named_modules() for key, child in module._modules.items()]
    places: defaultdict[int, list[str]] = defaultdict(list)
    for name, key, child in [("", "", model), *held]:
        for parameter in () if child is None else child.parameters(recurse=False):
            places[id(parameter)].append(f"{name}.{key}".lstrip("."))
    for name in names:
        shared = places[id(model.get_submodule(name).weight)]
        if len(shared) > 1:
            raise ValueError(
                f"{' and '.join(shared)} have one weight (tied weights), and {method} would change it for all of them: "
                f"{todo}"
            )
    adapted = {place for place, _ in added_to(model)} & set(names)
    if adapted:
        raise ValueError(
            f"{', '.join(sorted(adapted))} has an adapter, which {method}'s factors would come behind, and merged into "
            f"the weight before: {todo}"
        )


@contextmanager
def merged(tuner: "BaseTuner", factors: Mapping[str, nn.Parameter], method: str, todo: str) -> Iterator[None]:
    """Merge the factors of `tuner` into the weights at the end.

    Args:
        tuner: peft's model, with all factors.
        factors: one of each layer, by the layer's name.
        method: what the errors call it.
        todo: what the errors say is to be done.

    Raises:
        ValueError: at the first step of an optimizer, before it changes anything, one of `factors` has no gradient.
    """
    # PyTorch's own layers of a transformer read the weights of their linear layers in inference: not the factors.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    first_step = register_optimizer_step_pre_hook(partial(_check_reached, dict(factors), method, todo))

    def put_back() -> None:
        first_step.remove()
        torch.backends.mha.set_fastpath_enabled(fast)
        tuner.merge_and_unload(progressbar=False)

    with at_the_end(put_back):
        yield


def _check_reached(
    factors: dict[str, nn.Parameter], method: str, todo: str, optimizer: torch.optim.Optimizer, *_: object
) -> None:
    """Refuse the first step of the factors' optimizer where one of them has no gradient."""
    if not factors:  # this was not the first step
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, factor in factors.items() if id(factor) in held and factor.grad is None]
    if missing:
        raise ValueError(
            f"{method}'s factors in {', '.join(missing)} got no gradient: the model uses the weight without calling "
            f"the layer, or does not need its output. {todo}"
        )
    if any(id(factor) in held for factor in factors.values()):
        factors.clear()


def hold(factor: nn.Parameter, rows: Sequence[slice], dim: int = 0) -> int:
    """Keep a part of a factor where it starts, by a gradient of zero.

    Args:
        factor: of LoRA or IA3.
        rows: those of its dimension `dim` that train; all others are kept.
        dim: the dimension that they are counted in.

    Returns:
        How many numbers of the factor are kept.
    """
    held = torch.ones(factor.shape[dim], dtype=torch.bool, device=factor.device)
    for part in rows:
        held[part] = False
    if not held.any():
        return 0
    held = held.reshape(-1, *(1,) * (factor.ndim - 1 - dim))
    factor.register_hook(lambda grad: grad.masked_fill(held.to(grad.device), 0))
    return int(held.sum()) * (factor.numel() // factor.shape[dim])
