"""A wrapper for a model that takes normalised images, so that it can be attacked in the images' units, [0, 1]."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fastadv._warnings import warn
from fastadv.functional import Normalization, to_float
from fastadv.nn.inside import as_module
from fastadv.nn.logits import AnyModel


class Normalized(nn.Module):
    """The model images -> model((images - mean) / std), for images in [0, 1].

    For an attack on it images are in [0, 1], and eps is in pixels. The attack does not run this normalisation: its
    steps write the model's normalised input themselves. They can, because the sign of the gradient is the same with
    respect to the images and to the normalised images.

    Args:
        model: any callable from normalised images (N, C, ...) to its outputs.
        mean: the mean of pixels in [0, 1]: a number, or one per channel.
        std: the standard deviation of pixels in [0, 1]: a number, or one per channel.

    Raises:
        ValueError: std is not above 0; mean or std is not finite; or, as for pixels of [0, 255], mean is above 1 or std
            above 5.
    """

    def __init__(self, model: AnyModel, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        self.model: AnyModel = model
        self.normalization = of_pixels(mean, std)
        inside = next((m for m in as_module(model).modules() if _normalises(m)), None)
        if inside is not None:
            warn(
                f"the model seems to normalise its input already, in a {type(inside).__name__}: "
                "without Normalized it takes images in [0, 1]"
            )

    def extra_repr(self) -> str:
        return repr(self.normalization)

    def forward(self, images: torch.Tensor) -> Any:
        return self.model(self.normalization(to_float(images)))


def of_pixels(mean: float | Sequence[float], std: float | Sequence[float]) -> Normalization:
    """The normalisation of images in [0, 1].

    Args:
        mean: a number, or one per channel.
        std: a number, or one per channel.

    Raises:
        ValueError: std is not above 0; mean or std is not finite; or, as for pixels of [0, 255], mean is above 1 or std
            above 5.
    """
    normalization = Normalization(mean, std)
    facts = ("mean", mean, normalization.mean, 1), ("std", std, normalization.std, 5)
    for name, given, found, most in facts:
        if max(found if isinstance(found, tuple) else (found,)) > most:
            raise ValueError(
                f"{name} is {given}, for pixels of [0, 255], and images are in [0, 1]: divide mean and std by 255"
            )
    return normalization


def is_plain(model: nn.Module) -> bool:
    """Whether calling the module runs the `forward` of its class and nothing else, such as hooks or compiled code."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooked = _has_any_global_hook() or any(getattr(model, name) for name in hooks)
    return not hooked and not ({"forward", "_compiled_call_impl"} & _set(model))


def _set(model: nn.Module) -> set[str]:
    """The names of the attributes that are set on the module itself and are not None."""
    return {name for name, value in vars(model).items() if value is not None}


def _normalises(module: nn.Module) -> bool:
    """Whether a module is a Normalized, or looks like torchvision's Normalize: by its name, and by mean and std."""
    looks = "normaliz" in type(module).__name__.lower() and hasattr(module, "mean") and hasattr(module, "std")
    return looks or isinstance(module, Normalized)
