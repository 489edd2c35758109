"""One picture, from a file or from bytes, as RGB."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastadv._extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

_RUN = "EPS"  # the one format of Pillow's that is a program, run by Ghostscript
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class CorruptPictureError(ValueError):
    """A picture that cannot be decoded."""


@dataclass(frozen=True)
class Picture:
    """A picture not yet decoded: its file's path, or a name for messages and its bytes or pixels (H, W[, 3])."""

    name: str
    content: bytes | np.ndarray | None = None

    def read(self) -> "Image":
        if isinstance(self.content, np.ndarray):
            return require("PIL.Image").fromarray(self.content)
        return read(self.name) if self.content is None else decode(self.content, self.name)

    def stored(self) -> bytes | np.ndarray:
        """What it is made of: a file's bytes, or its content as it is."""
        return Path(self.name).read_bytes() if self.content is None else self.content


def extensions() -> frozenset[str]:
    """How the names of pictures end that Pillow can read, in lower case, such as ".jpg"."""
    image = require("PIL.Image")
    image.preinit()  # the common formats: Pillow tries them in the order in which they were registered
    return frozenset(ending for ending, name in image.registered_extensions().items() if name in _formats())


def _formats() -> list[str]:
    """Formats that are decoded, whatever a file is called, in the order in which they are tried."""
    image = require("PIL.Image")
    image.init()
    return [name for name in image.ID if name != _RUN]


def read(path: str | Path) -> "Image":
    """The picture in a file, as RGB.

    Turned upright as its EXIF data say; transparency is composited over white; 16-bit grey is scaled to 8 bits; of an
    animation the first frame.

    Raises:
        FileNotFoundError: no such file. ImportError: the `train` extra is not installed.
        ValueError: the file is damaged, is no picture, is too large, or has pixels without a known range.
    """
    return decode(Path(path).read_bytes(), str(path))


def decode(content: bytes, name: str) -> "Image":
    """The picture in a file's bytes, as `read` returns it; `name` is what an error calls it."""
    image_module, ops = require("PIL.Image"), require("PIL.ImageOps")
    try:
        with image_module.open(io.BytesIO(content), formats=_formats()) as picture:
            ops.exif_transpose(picture, in_place=True)
            return _rgb(picture)
    except image_module.DecompressionBombError as error:
        raise CorruptPictureError(f"{name} has too many pixels to be opened safely: make it smaller") from error
    except Exception as error:  # what Pillow's decoders raise on damaged files has no common base
        raise CorruptPictureError(f"{name} cannot be read as a picture ({error}): replace it or delete it") from error


def _rgb(picture: "Image") -> "Image":
    if picture.mode in _SIXTEEN_BITS:
        return _eight_bits(picture).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save it with 8 bits")
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = require("PIL.Image").new("RGBA", picture.size, "white")
        picture = require("PIL.Image").alpha_composite(white, picture)
    return picture.convert("RGB")


def _eight_bits(picture: "Image") -> "Image":
    grey = np.asarray(picture).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("its grey values do not fit in 16 bits; save it with 8 bits")
    return require("PIL.Image").fromarray(((grey + 128) // 257).astype(np.uint8))
