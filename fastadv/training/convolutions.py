"""Refuses convolutions whose gradients PyTorch computes wrongly on a CPU."""

import torch
from torch import nn

from fastadv.training.settings import Settings

BLOCK = 16  # channels in a block of the library with AVX-512. With AVX2 it is 8, and 8 to 15 channels are right.


def check_convolutions(model: nn.Module, settings: Settings) -> None:
    """Refuse 1x1 convolutions with a stride and fewer than 16 channels, if their weights train in channels-last layout.

    oneDNN, PyTorch's library for CPUs, writes the gradients of these weights beyond their memory. With several threads
    the process dies, or the gradients are wrong (https://github.com/uxlfoundation/oneDNN/issues/6035; PyTorch 2.13).
    torch.compile may choose channels-last by itself, and a layer in that layout passes it on to the next layer. Attacks
    are not concerned: they need the gradients of images only.

    Args:
        model: the network, before training.
        settings: the settings of the run.

    Raises:
        ValueError: the model has such a layer, and the run would train it in channels-last layout.
    """
    trained = {"full", "lora"} & {stage.method for stage in settings.stages}
    if not trained or not (settings.channels_last or settings.compile or _in_channels_last(model)):
        return
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and _overruns(layer):
            raise ValueError(
                f"{name} is a 1x1 convolution with a stride and {layer.in_channels} channels. With fewer than {BLOCK}, "
                "PyTorch on a CPU can crash or give wrong gradients in channels-last layout, which compile uses too. "
                "Train without channels_last and compile and with the model in the default layout, or on a GPU"
            )


def _overruns(layer: nn.Conv2d) -> bool:
    strided = layer.kernel_size == (1, 1) and layer.stride != (1, 1)
    return strided and layer.groups == 1 and layer.in_channels < BLOCK


def _in_channels_last(model: nn.Module) -> bool:
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    return any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
