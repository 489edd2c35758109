"""Norm tuning: only normalisation layers train, as in peft's LN Tuning (Zhao et al. 2023, arXiv 2312.11420)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastadv.training.options import Chosen, Options


@contextmanager
def norm(model: nn.Module, options: Options) -> Iterator[Chosen]:
    """Choose the weights and biases of the layers whose class has "norm" in its name, such as LayerNorm; and of GRN.

    Unlike peft's method it copies no layer: the model's own layers train.

    Args:
        model: the network.
        options: none of them is used.

    Yields:
        These parameters.

    Raises:
        ValueError: the model has no such layer with weights.
    """
    norms = [module for module in model.modules() if _is_norm(module)]
    parameters = [parameter for module in norms for parameter in module.parameters(recurse=False)]
    for module in filter(is_parametrized, norms):  # what a weight is computed from is in a module of the layer's
        parameters += module.get_submodule("parametrizations").parameters()
    if not parameters:
        raise ValueError(
            "norm trains normalisation layers, such as nn.LayerNorm or nn.BatchNorm2d, and the model has none with "
            "weights: choose another method"
        )
    yield Chosen(parameters)


def _is_norm(module: nn.Module) -> bool:
    """Whether a layer normalises its input; a linear layer or convolution with normalised weights does not.

    Nor does a block that has such layers, such as the NormFreeBlock of timm's NFNet.
    """
    weighs = any(isinstance(part, (nn.Linear, nn.modules.conv._ConvNd)) for part in module.modules())
    name = type(module).__name__.lower()
    return ("norm" in name or name.endswith("grn")) and not weighs  # ConvNextV2GRN: global response normalization
