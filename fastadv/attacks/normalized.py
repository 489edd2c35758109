"""Images that were normalised already, and their pixels."""

from collections.abc import Callable
from typing import Any

import torch

from fastadv.attacks.checks import BOX, box_of, in_box
from fastadv.functional import Normalization
from fastadv.nn.inside import as_module
from fastadv.nn.logits import AnyModel
from fastadv.nn.normalized import Normalized, of_pixels
from fastadv.ops.reference import compute_dtype

BEYOND = 1e-5  # a bound, by rounding: what normalising float32 images and its inverse leave


def normalization_of(images_normalized: tuple[Any, Any], model: AnyModel) -> Normalization:
    """The normalisation of an attack's images, (mean, std) as for `Normalized`, where `model` takes such images.

    Raises:
        TypeError: it is no such pair.
        ValueError: mean or std are out of range, or the model is or reaches a `Normalized`, which normalises once more.
    """
    try:
        mean, std = images_normalized
    except (TypeError, ValueError):
        raise TypeError(f"images_normalized must be (mean, std), or None, got {images_normalized!r}") from None
    if any(isinstance(module, Normalized) for module in as_module(model).modules()):
        raise ValueError(
            "images_normalized says that the images are normalised already, and Normalized(model, mean, std) would do "
            "it again: pass the attack the model without it, or images in [0, 1] without images_normalized"
        )
    return of_pixels(mean, std)


def denormalized(
    images: torch.Tensor,
    normalization: Normalization,
    clip: tuple[float, float] | None = BOX,
    *,
    look: bool = True,
    count: Callable[[str, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The pixels of normalised images: images * std + mean, in the box `clip`.

    Args:
        images: (N, C, ...) floats, (pixels - mean) / std.
        normalization: the loader's.
        clip: the box that the pixels are in; None for none.
        look: refuse pixels farther beyond the box than rounding explains, which waits for the device.
        count: called where nothing is refused, with "images" and whether all pixels are in the box, 0-dim bool.

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
    slack = max(BEYOND, 2 * torch.finfo(images.dtype).eps)
    if count is not None and not look and images.numel():
        count("images", in_box(pixels, clip, slack))
    if look and images.numel():
        low, high = torch.stack(pixels.aminmax()).tolist()
        if not (lo - slack <= low and high <= hi + slack):
            raise ValueError(
                f"images * std + mean must be pixels in [{lo:g}, {hi:g}], and with {normalization} they are in "
                f"[{low:.6g}, {high:.6g}]: were the images normalised with another mean and std, or not at all?"
            )
    return torch.empty_like(images).copy_(pixels.clamp_(lo, hi))
