"""A model that takes normalised images, as one that takes images in [0, 1]."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastadv.data import to_float
from fastadv.functional import Normalization


class Normalized(nn.Module):
    """`model` on (images - mean) / std, for images in [0, 1].

    An attack on it keeps images in [0, 1] and eps in pixels, and never runs this normalisation: its steps write the
    model's normalised input themselves, and the gradient's sign is the same on either side of it.

    Args:
        model: any callable from normalised images (N, C, ...) to its outputs.
        mean, std: a number, or one per channel, for images in [0, 1].

    Raises:
        ValueError: std is not above 0, or mean or std are not finite.
    """

    def __init__(self, model: Callable, mean: float | Sequence[float], std: float | Sequence[float]):
        super().__init__()
        self.model = model
        self.normalization = Normalization(mean, std)
        inside = [name for name, m in model.named_modules() if _normalises(m)] if isinstance(model, nn.Module) else []
        if inside:
            warnings.warn(
                f"the model seems to normalise its input already, in {inside[0] or type(model).__name__}: "
                "without Normalized it takes images in [0, 1]",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        return repr(self.normalization)

    def forward(self, images: torch.Tensor) -> object:
        return self.model(self.normalization(to_float(images)))


def _normalises(module: nn.Module) -> bool:
    """By its looks: torchvision's Normalize, or one of the many of that kind."""
    return "normaliz" in type(module).__name__.lower() and hasattr(module, "mean") and hasattr(module, "std")
