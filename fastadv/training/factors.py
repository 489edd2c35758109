"""The common part of LoRA and IA3: peft's factors beside a layer's weight, which are merged into it at the end."""

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
    """A pattern for exactly these names. peft would match the names of a list by their endings."""
    return "|".join(map(re.escape, names))


def check_targets(model: nn.Module, names: Sequence[str], method: str, todo: str) -> None:
    """Refuse layers that share their weight with another layer, or that have an adapter on their output.

    Args:
        model: the network.
        names: the names of the layers.
        method: the name of the method, for the error.
        todo: the advice in the error.

    Raises:
        ValueError: there is such a layer.
    """
    # A weight may be in several places: two layers may share one, and one layer may be in two places.
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
            f"{', '.join(sorted(adapted))} has an adapter: {method}'s factors would act after it in training, and "
            f"before it once they are merged into the weight: {todo}"
        )


@contextmanager
def merged(tuner: "BaseTuner", factors: Mapping[str, nn.Parameter], method: str, todo: str) -> Iterator[None]:
    """Merge the factors of `tuner` into the weights at the end.

    Args:
        tuner: peft's model, with all factors.
        factors: {name of a layer: one of its factors}.
        method: the name of the method, for the error.
        todo: the advice in the error.

    Raises:
        ValueError: one of `factors` has no gradient at the first step of an optimizer; nothing was changed.
    """
    # In inference PyTorch's own transformer layers read the weights of their linear layers directly, without factors.
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
    """Refuse the first step of the factors' optimizer where a factor has no gradient."""
    if not factors:  # the first step is over
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
    """Let only some rows of a factor train: the gradient of all others is set to zero.

    Args:
        factor: a factor of LoRA or IA3.
        rows: the rows that train.
        dim: the dimension of the factor that has the rows.

    Returns:
        How many numbers of the factor do not train.
    """
    held = torch.ones(factor.shape[dim], dtype=torch.bool, device=factor.device)
    for part in rows:
        held[part] = False
    if not held.any():
        return 0
    held = held.reshape(-1, *(1,) * (factor.ndim - 1 - dim))
    factor.register_hook(lambda grad: grad.masked_fill(held.to(grad.device), 0))
    return int(held.sum()) * (factor.numel() // factor.shape[dim])
