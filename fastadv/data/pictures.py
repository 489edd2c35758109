"""One picture, from a file or from bytes, as RGB."""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastadv._extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastadv.preprocessing import Preprocessing

_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # in EXIF data
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # in a TIFF
_RUN = "EPS"  # the one format of Pillow's that is a program, run by Ghostscript
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_FEW_BITS = {"L;2": 255 // 3, "L;4": 255 // 15}  # grey of 2 and of 4 bits
_TWELVE_BITS = 1 << 12


Box = tuple[float, float, float, float]  # left, top, right, bottom


class CorruptPictureError(ValueError):
    """A picture that cannot be decoded."""


@dataclass(frozen=True)
class Picture:
    """A picture that is not decoded yet.

    Attributes:
        name: its file's path; with `content` a name for messages.
        content: a file's bytes, or pixels uint8 (H, W) or (H, W, 3); None: they are in the file called `name`.
    """

    name: str
    content: bytes | np.ndarray | None = None

    def prepared(self, preprocessing: "Preprocessing") -> np.ndarray:
        """Its pixels for a model, uint8 (C, H, W): the same bits in training, evaluation and prediction."""
        content = self.stored()
        if isinstance(content, np.ndarray):
            return preprocessing.apply(self.read())
        return preprocessing.apply(*decode(content, self.name, preprocessing.enough))

    def read(self) -> "Image":
        """The picture as RGB.

        Raises:
            CorruptPictureError: there is none, or it cannot be read or decoded.
        """
        content = self.stored()
        return _of_array(content) if isinstance(content, np.ndarray) else decode(content, self.name)[0]

    def stored(self) -> bytes | np.ndarray:
        """The bytes of its file, or its content as it is.

        Raises:
            CorruptPictureError: there is nothing, or the file cannot be read.
        """
        content = self._file_content() if self.content is None else self.content
        if isinstance(content, bytes) and not content:
            raise CorruptPictureError(f"{self.name} is empty: replace it or delete it")
        return content

    def _file_content(self) -> bytes:
        try:
            if not stat.S_ISREG(os.stat(self.name).st_mode):  # of which a pipe would never end
                raise CorruptPictureError(f"{self.name} is a device, a pipe or a folder, no picture: delete it")
            return Path(self.name).read_bytes()
        except OSError as error:
            raise CorruptPictureError(
                f"{self.name} cannot be read ({error.strerror}): replace it or delete it"
            ) from error


def extensions() -> frozenset[str]:
    """The endings of the files that Pillow can read, in lower case, such as ".jpg"."""
    image = require("PIL.Image")
    return frozenset(ending for ending, name in image.registered_extensions().items() if name in _formats())


def _formats() -> list[str]:
    """Formats that are decoded, whatever a file is called, in the order in which they are tried."""
    image = require("PIL.Image")
    image.preinit()  # the common ones: Pillow tries formats in the order in which they were registered
    image.init()
    return [name for name in image.ID if name != _RUN]


def read(path: str | Path) -> "Image":
    """The picture in a file, as RGB.

    Turned upright as its EXIF data say; transparency is composited over white; 16-bit grey is scaled to 8 bits, so
    that 65535 becomes 255; of an animation the first frame.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the `train` extra is not installed.
        ValueError: the file is damaged, is no picture, is too large, or has pixels of an unknown range.
    """
    return decode(Path(path).read_bytes(), str(path))[0]


def decode(content: bytes, name: str, enough: tuple[int, int] | None = None) -> tuple["Image", Box]:
    """The picture in a file's bytes, as `read` returns it, and where it lies.

    Args:
        content: of a file.
        name: what an error calls it.
        enough: (H, W), upright. A JPEG is decoded at a half, a quarter or an eighth of its size, the least that has as
            many pixels on either side, which takes a fraction of the time. None: at its own size, as other formats are.

    Returns:
        The picture, and the box (left, top, right, bottom) that the file's picture fills in it. A reduced JPEG ends in
        part of a pixel: 225 pixels at an eighth fill 28.125 of 29.

    Raises:
        CorruptPictureError: the file is damaged, is no picture, is too large, or has pixels of an unknown range.
    """
    image_module, ops = require("PIL.Image"), require("PIL.ImageOps")
    try:
        with image_module.open(io.BytesIO(content), formats=_formats()) as picture:
            box: Box | None = None
            if enough is not None:
                orientation = picture.getexif().get(_ORIENTATION)
                reduced = picture.draft(None, enough if orientation in _ON_ITS_SIDE else enough[::-1])
                if reduced is not None:  # it is a JPEG
                    box = _upright(reduced[1], picture.size, orientation)
            raw = [str(tile[3]) for tile in getattr(picture, "tile", ())]
            if (few := _FEW_BITS.keys() & raw) and "transparency" in picture.info:
                picture.info["transparency"] *= _FEW_BITS[few.pop()]  # Pillow scales the pixels alone
            deep = any(";16" in mode for mode in raw)
            ops.exif_transpose(picture, in_place=True)
            return _rgb(picture, deep), box or (0, 0, *picture.size)
    except image_module.DecompressionBombError as error:
        raise CorruptPictureError(f"{name} has too many pixels to be opened safely: make it smaller") from error
    except image_module.UnidentifiedImageError as error:
        raise CorruptPictureError(
            f"{name} cannot be read as a picture (unknown content): replace it or delete it"
        ) from error
    except Exception as error:  # what Pillow's decoders raise on damaged files has no common base
        raise CorruptPictureError(f"{name} cannot be read as a picture ({error}): replace it or delete it") from error


def _upright(box: Box, size: tuple[int, int], orientation: int | None) -> Box:
    """A box in the upper left corner of a picture of the size (W, H), after the picture was turned upright.

    Orientation 3 turns by 180 degrees: the box (0, 0, 30, 20) of a picture of 32 x 24 becomes (2, 4, 32, 24).
    """
    (width, height), (all_columns, all_rows) = box[2:], size
    if orientation in _ON_ITS_SIDE:
        width, height, all_columns, all_rows = height, width, all_rows, all_columns
    left = all_columns - width if orientation in (2, 3, 6, 7) else 0
    top = all_rows - height if orientation in (3, 4, 7, 8) else 0
    return left, top, left + width, top + height


def _rgb(picture: "Image", deep: bool) -> "Image":
    """The picture in 8 bits a colour. Of a `deep` one, of 16 bits a colour, Pillow has kept the upper 8."""
    if deep and picture.mode in ("LA", "RGB", "RGBA"):
        colours = np.asarray(picture)[..., : 1 if picture.mode == "LA" else 3]
        _check_bright(257 * int(colours.max()))
    if picture.mode in _SIXTEEN_BITS:
        return _eight_bits(picture).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save it with 8 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = require("PIL.Image").new("RGBA", picture.size, "white")
        picture = require("PIL.Image").alpha_composite(white, picture)
    return picture.convert("RGB")


def _eight_bits(picture: "Image") -> "Image":
    grey = np.asarray(picture).astype(np.int64)
    if getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits alone
        grey = 65535 - grey
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("its grey values do not fit in 16 bits; save it with 8 bits")
    _check_bright(int(grey.max()))
    eight = ((grey + 128) // 257).astype(np.uint8)
    eight[grey == picture.info.get("transparency", -1)] = 255  # white, as all that is transparent
    return _of_array(eight)


def _check_bright(brightest: int) -> None:
    """Refuse a picture that would be almost black, such as a camera's 12 bits, or 8 bits, in a file of 16 bits."""
    if 0 < brightest < _TWELVE_BITS:
        raise ValueError(
            f"its file has 16 bits, but its brightest value is {brightest} of 65535, so it would be almost black; save "
            "it with 8 bits, scaled to 0..255"
        )


def _of_array(pixels: np.ndarray) -> "Image":
    picture: Image = require("PIL.Image").fromarray(pixels)
    return picture
