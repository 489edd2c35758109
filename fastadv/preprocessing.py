"""Turns a picture into a model's pixels, with the same bits in training, evaluation and prediction."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadv._extras import require
from fastadv.names import instead

if TYPE_CHECKING:
    from PIL.Image import Image

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
LONGEST = 8192  # pixels of a side: settings from a damaged or hostile file must not fill the memory
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Preprocessing:
    """The images that a model takes.

    Args:
        size: (H, W) in pixels.
        channels: 3 (RGB) or 1 (grey).
        mean: the mean of pixels in [0, 1], one for each channel, or one for all. `apply` does not subtract it; the
            model's wrapper `Normalized` does.
        std: the standard deviation, likewise.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        crop: the share of a resized picture's shorter side that is kept (timm's crop_pct), in (0, 1].

    Raises:
        ValueError: a value is not allowed.
    """

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    interpolation: str = "bicubic"
    crop: float = 1.0

    def __post_init__(self) -> None:
        if self.channels not in _MODES:
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            values = values * self.channels if len(values) == 1 else values
            if len(values) != self.channels or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be {self.channels} finite numbers or one, got {getattr(self, name)}")
            object.__setattr__(self, name, values)
        if max(map(abs, self.mean)) > 2:
            raise ValueError(f"mean must be of pixels in [0, 1], got {self.mean}: divide mean and std by 255")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if len(self.size) != 2 or any(int(side) != side or side < 1 for side in self.size):
            raise ValueError(f"size must be (H, W) in pixels, got {self.size}")
        object.__setattr__(self, "size", tuple(int(side) for side in self.size))
        if self.interpolation not in INTERPOLATIONS:
            wrong = self.interpolation
            raise ValueError(f"unknown interpolation {wrong!r}{instead(wrong, INTERPOLATIONS)}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must be in (0, 1], got {self.crop}")
        if max(self.size) / self.crop > LONGEST:
            raise ValueError(
                f"size {self.size} and crop {self.crop:g} mean pictures with a side of more than {LONGEST} pixels: the "
                "settings are damaged"
            )

    @property
    def covered(self) -> tuple[int, int]:
        """(H, W) that a resized picture just covers before its centre is cut out: (256, 256) for 224 and crop 0.875."""
        # Rounded before the floor, because 224 / (224 / 354) is a little below 354.
        height, width = (math.floor(round(side / self.crop, 6)) for side in self.size)
        return height, width

    @property
    def enough(self) -> tuple[int, int] | None:
        """(H, W) at which a larger JPEG may be decoded, for speed; None means at its own size.

        It is twice `covered`, so that resizing still averages pixels. On photographs a pixel then differs by at most 3
        of 255 from the pixel of the picture that was decoded at its own size. A 12-megapixel JPEG for 224 pixels takes
        a fifth of the time.
        """
        height, width = self.covered
        return None if self.interpolation == "nearest" else (2 * height, 2 * width)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.channels, *self.size

    def apply(self, picture: "Image", box: tuple[float, float, float, float] | None = None) -> np.ndarray:
        """The model's pixels of a picture.

        A picture that has the model's size already keeps its pixels, whatever `crop` is: it was prepared before. Any
        other picture is resized, with its aspect ratio, until it just covers size / crop; then its centre is cut out.
        Sizes are rounded as by torchvision's Resize and CenterCrop. `fastadv.data.pictures.read` reads pictures, and
        deals with rotation, transparency and 16 bits.

        Args:
            picture: a picture of any mode and size.
            box: (left, top, right, bottom) in pixels, the part to use; None means the whole picture.

        Returns:
            uint8 (C, H, W).
        """
        mode, (height, width) = _MODES[self.channels], self.size
        if picture.mode != mode:
            picture = picture.convert(mode)
        if picture.size != (width, height):
            resample = require("PIL.Image").Resampling[self.interpolation.upper()]
            left, top, right, bottom = box or (0, 0, *picture.size)
            picture = picture.resize(self._resized(right - left, bottom - top), resample, box)
            left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
            picture = picture.crop((left, top, left + width, top + height))
        pixels = np.asarray(picture).reshape(height, width, self.channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _resized(self, width: float, height: float) -> tuple[int, int]:
        least_height, least_width = self.covered
        if least_height * width >= least_width * height:
            return int(width * least_height // height), least_height
        return least_width, int(height * least_width // width)

    def to_json(self) -> dict[str, Any]:
        """The settings as a dict that JSON can hold."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocessing":
        """The settings in a dict that `to_json` made.

        Raises:
            TypeError: a value is of a wrong type.
            ValueError: an entry is unknown or out of range, or size is missing.
        """
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown or "size" not in values:
            problem = f"unknown: {', '.join(sorted(unknown))}" if unknown else "size is missing"
            raise ValueError(f"these are no settings of a preprocessing ({problem}): {values}")
        return cls(**values)
