"""The normalisation layers train, as with peft's LN Tuning (Zhao et al. 2023, arXiv 2312.11420)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastadv.training.options import Chosen, Options


@contextmanager
def norm(model: nn.Module, options: Options) -> Iterator[Chosen]:
    """Weights and biases of the layers whose class is called a norm, as those of torch, timm and transformers are.

    Unlike peft's method it copies no layer: those that train are the model's own.

    Raises:
        ValueError: there are none.
    """
    norms = [module for module in model.modules() if _is_norm(module)]
    parameters = [parameter for module in norms for parameter in module.parameters(recurse=False)]
    if not parameters:
        raise ValueError(
            "norm trains normalisation layers, such as nn.LayerNorm or nn.BatchNorm2d, and the model has none with "
            "weights: choose another method"
        )
    yield Chosen(parameters)


def _is_norm(module: nn.Module) -> bool:
    """A layer of linear or convolutional weights that are normalised is none."""
    weighs = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    return "norm" in type(module).__name__.lower() and not weighs
