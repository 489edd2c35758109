"""Optimisers by name, and their states as tensors by name."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fastadv.training.settings import Settings


def optimizer_of(parameters: Sequence[tuple[str, nn.Parameter]], s: Settings) -> torch.optim.Optimizer:
    weights = [p for _, p in parameters if p.ndim > 1]
    others = [p for _, p in parameters if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": s.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if s.optimizer == "adamw":
        return torch.optim.AdamW(groups, s.lr)
    return torch.optim.SGD(groups, s.lr, momentum=0.9, nesterov=True)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    states = optimizer.state_dict()["state"].items()
    return {f"{i}.{key}": t for i, state in states for key, t in state.items() if isinstance(t, torch.Tensor)}


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, t in tensors.items():
        number, _, key = name.partition(".")
        states.setdefault(int(number), {})[key] = t
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
