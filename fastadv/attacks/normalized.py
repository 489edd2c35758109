"""Models that take normalised images, attacked in pixels of [0, 1]."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastadv.attacks.checks import BOX, box_of
from fastadv.data import to_float
from fastadv.functional import Normalization
from fastadv.ops.reference import compute_dtype

BEYOND = 1e-5  # a bound, by rounding: what normalising float32 images and its inverse leave


class Normalized(nn.Module):
    """`model` on (images - mean) / std, for images in [0, 1].

    An attack on it keeps images in [0, 1] and eps in pixels, and never runs this normalisation: its steps write the
    model's normalised input themselves, and the gradient's sign is the same on either side of it.

    Args:
        model: any callable from normalised images (N, C, ...) to its outputs.
        mean, std: a number, or one per channel, for images in [0, 1].

    Raises:
        ValueError: std is not above 0, mean or std are not finite, or a mean is above 1: it is for pixels of [0, 255].
    """

    def __init__(self, model: Callable, mean: float | Sequence[float], std: float | Sequence[float]):
        super().__init__()
        self.model = model
        self.normalization = _of_pixels(mean, std)
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


def normalization_of(images_normalized: tuple, model: Callable) -> Normalization:
    """The normalisation of an attack's images, (mean, std) as for `Normalized`, where `model` takes such images.

    Raises:
        TypeError: it is no such pair.
        ValueError: mean or std are out of range, or the model is `Normalized`, which normalises once more.
    """
    try:
        mean, std = images_normalized
    except (TypeError, ValueError):
        raise TypeError(f"images_normalized must be (mean, std), or None, got {images_normalized!r}") from None
    if isinstance(model, nn.Module) and any(isinstance(module, Normalized) for module in model.modules()):
        raise ValueError(
            "images_normalized says that the images are normalised already, and Normalized(model, mean, std) would do "
            "it again: pass the attack the model without it, or images in [0, 1] without images_normalized"
        )
    return _of_pixels(mean, std)


def denormalized(
    images: torch.Tensor,
    normalization: Normalization,
    clip: tuple[float, float] | None = BOX,
    *,
    look: bool = True,
) -> torch.Tensor:
    """The pixels of normalised images: images * std + mean, in the box `clip`.

    Args:
        images: (N, C, ...) floats, (pixels - mean) / std.
        normalization: the loader's.
        clip: the box that the pixels are in; None for none.
        look: refuse pixels farther beyond the box than rounding explains, which waits for the device.

    Returns:
        A tensor like `images`, in their dtype and layout. What rounding left beyond the box, up to 1e-5 or two units
        of the dtype's rounding, is put back on its bound.

    Raises:
        TypeError: the images are no floats.
        ValueError: they have other channels than the normalisation, or pixels farther beyond the box.
    """
    if not images.is_floating_point():
        raise TypeError(
            f"images_normalized takes normalised images, floats, and got {images.dtype}, which is of pixels: pass "
            "Normalized(model, mean, std) as the model instead"
        )
    normalization.check(images)
    mean, scale = normalization.parameters(images.ndim, compute_dtype(images), images.device)
    pixels = images.to(mean.dtype) / scale + mean
    lo, hi = box_of(clip)
    if look and images.numel():
        slack = max(BEYOND, 2 * torch.finfo(images.dtype).eps)
        low, high = torch.stack(pixels.aminmax()).tolist()
        if not (lo - slack <= low and high <= hi + slack):
            raise ValueError(
                f"images * std + mean must be pixels in [{lo:g}, {hi:g}], and with {normalization} they are in "
                f"[{low:.6g}, {high:.6g}]: were the images normalised with another mean and std, or not at all?"
            )
    return torch.empty_like(images).copy_(pixels.clamp_(lo, hi))


def _of_pixels(mean, std):
    normalization = Normalization(mean, std)
    means = normalization.mean if isinstance(normalization.mean, tuple) else (normalization.mean,)
    if max(means) > 1:
        raise ValueError(
            f"mean is {mean}, for pixels of [0, 255], and images are in [0, 1]: divide mean and std by 255"
        )
    return normalization


def is_plain(model: nn.Module) -> bool:
    """Whether calling it runs its class's `forward` and nothing else: no hooks, no forward of its own, not compiled."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return not any(getattr(model, name) for name in hooks) and not ({"forward", "_compiled_call_impl"} & _set(model))


def _set(model):
    return {name for name, value in vars(model).items() if value is not None}


def _normalises(module: nn.Module) -> bool:
    """By its looks: torchvision's Normalize, or one of the many of that kind."""
    return "normaliz" in type(module).__name__.lower() and hasattr(module, "mean") and hasattr(module, "std")
