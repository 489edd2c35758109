"""What an attack borrows from a model, and how it gives it back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def flags_kept(model: Callable) -> Iterator[None]:
    """Put back every module's `training` and every parameter's `requires_grad` at the end, whatever happens.

    Flags are set on the modules themselves: `.eval()` and `.train()` are methods that models override (to
    keep batch-norm frozen, say), and they cannot put back a model whose modules are in different modes.
    A model that is not an `nn.Module` has no flags.
    """
    training = [(module, module.training) for module in _modules(model)]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in _parameters(model)]
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)


@contextmanager
def frozen(model: Callable) -> Iterator[None]:
    """Every module in eval mode and no parameter requiring grad, until the end."""
    with flags_kept(model):
        for module in _modules(model):
            module.training = False
        for parameter in _parameters(model):
            parameter.requires_grad_(False)
        yield


def as_normal(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without its graph; a copy if it is an inference tensor, which autograd refuses to save."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _modules(model: Callable) -> list[nn.Module]:
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _parameters(model: Callable) -> list[nn.Parameter]:
    return list(model.parameters()) if isinstance(model, nn.Module) else []
