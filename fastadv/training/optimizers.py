"""Makes optimizers by name, and saves their states as tensors by name."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import nn

from fastadv.training.settings import Settings

# Matches the last word of the names of position embeddings, of class and other tokens, and of attention biases.
_NO_DECAY = re.compile(
    r"(^|_)(pos|position|positional|rel|relative|cls|bias|biases)(_|\d|$)|tokens?\d*(_\d+)?$|^class_emb"
)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)  # their weights may have several dimensions; other norms' have one


def optimizer_of(
    model: nn.Module, parameters: Sequence[tuple[str, nn.Parameter]], s: Settings
) -> torch.optim.Optimizer:
    """The optimizer of `parameters`. Weight decay applies to the weights of linear layers and convolutions alone.

    Args:
        model: the model that has the parameters.
        parameters: (name, parameter) for each parameter that trains.
        s: the settings with the optimizer's name, its learning rate and its weight decay.
    """
    kept = _without_decay(model)
    weights = [p for _, p in parameters if id(p) not in kept]
    others = [p for _, p in parameters if id(p) in kept]
    groups = [{"params": weights, "weight_decay": s.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    rate = cast(float, s.lr)
    if s.optimizer == "adamw":
        return torch.optim.AdamW(groups, rate)
    return torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True)


def _without_decay(model: nn.Module) -> set[int]:
    """The ids of the parameters without weight decay.

    These are biases, norms, position embeddings, tokens, IA3's vectors, whose values are about 1, and the parameters
    that a model of timm's lists. A tied parameter has several names, so it is found by its id.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    listing = {name: m for name, m in modules.items() if callable(getattr(m, "no_weight_decay", None))}
    listed = [f"{name}.{pattern}".lstrip(".") for name, m in listing.items() for pattern in m.no_weight_decay()]
    return {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.ndim <= 1
        or ".ia3_l." in name
        or isinstance(modules[name.rpartition(".")[0]], _NORMS)
        or _NO_DECAY.search(_called(name, modules))
        or any(fnmatchcase(name, pattern) for pattern in listed)
    }


def _called(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The last word of a parameter's name; for the weight of an nn.Embedding that of the embedding: "pos_embed"."""
    owner, _, word = name.rpartition(".")
    return owner.rpartition(".")[2] if isinstance(modules[owner], nn.Embedding) else word


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The tensors of an optimizer's state, by the number of the parameter and a name, such as "0.exp_avg"."""
    states = optimizer.state_dict()["state"].items()
    return {f"{i}.{key}": t for i, state in states for key, t in state.items() if isinstance(t, torch.Tensor)}


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load the tensors that `state_of` returned."""
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, t in tensors.items():
        number, _, key = name.partition(".")
        states.setdefault(int(number), {})[key] = t
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
