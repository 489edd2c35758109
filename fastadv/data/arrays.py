"""Sets that are arrays: scikit-learn's digits, and .npz files."""

import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastadv._extras import require
from fastadv.data.source import Part, Source, digests

_HAIR = 1e-6  # by which rounding puts a float beyond [0, 1]
_REQUIRED = ("x_train", "y_train", "x_test", "y_test")


def digits(codes: bool) -> Source:
    """1,797 grey 8x8 images, one part: float32 in [0, 1], or uint8 if `codes`, with the same digests."""
    images, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8) / 16  # 16 is the brightest
    rounded = np.rint(255 * images).astype(np.uint8)
    source = _source({"x_train": rounded if codes else images, "y_train": labels})
    contents = digests(torch.from_numpy(rounded))
    return replace(source, parts={"train": replace(source.parts["train"], digests=contents)})


def npz(path: Path) -> Source:
    """x_train, y_train, x_test, y_test, and x_val and y_val if the file has them.

    Floats that rounding put beyond [0, 1] by a hair are clamped.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in (*_REQUIRED, "x_val", "y_val") if key in archive}
    except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not an .npz file of plain arrays: {error}") from error
    for key in (*_REQUIRED, *(("x_val", "y_val") if {"x_val", "y_val"} & set(arrays) else ())):
        if key not in arrays:
            raise ValueError(f"{path} has no array {key}; it needs {', '.join(_REQUIRED)}")
    for key in arrays:
        if key.startswith("x"):
            _check_images(f"{path}: {key}", arrays[key])
            if arrays[key].dtype.kind == "f":
                np.clip(arrays[key], 0, 1, out=arrays[key])
            _check_labels(f"{path}: y{key[1:]}", arrays["y" + key[1:]], len(arrays[key]))
            if arrays[key].shape[1:] != arrays["x_train"].shape[1:]:
                raise ValueError(f"{path}: x_train and {key} hold images of different shapes")
    return _source(arrays)


def _check_images(name: str, images: np.ndarray) -> None:
    if images.dtype.kind != "f" and images.dtype != "uint8":
        raise ValueError(f"{name} must be uint8 or floating point, got {images.dtype}")
    if images.ndim != 4 or images.size == 0:
        raise ValueError(f"{name} must be images (N, C, H, W), got the shape {images.shape}")
    count, channels, height, width = images.shape
    if width in (1, 3, 4) and channels not in (1, 3) and width < min(channels, height):
        raise ValueError(
            f"{name} must be images (N, C, H, W), and {images.shape} is (N, H, W, C) as Keras has it: save "
            f"np.moveaxis({name.rpartition(' ')[2]}, -1, 1), of the shape {(count, width, channels, height)}"
        )
    if images.dtype.kind == "f" and not (images.min() >= -_HAIR and images.max() <= 1 + _HAIR):
        raise ValueError(f"{name} must be in [0, 1], got [{images.min():.9g}, {images.max():.9g}]")


def _check_labels(name: str, labels: np.ndarray, count: int) -> None:
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(f"{name} must be of shape ({count},), one for each image, got {labels.shape}")
    if labels.min() < 0:
        raise ValueError(f"{name} must not be negative, got {labels.min()}")


def _source(arrays: dict[str, np.ndarray]) -> Source:
    parts = {key[2:]: _part(arrays[key], arrays["y" + key[1:]]) for key in arrays if key.startswith("x")}
    count = 1 + max(int(part.labels.max()) for part in parts.values())
    return Source(parts, tuple(str(label) for label in range(count)))


def _part(images: np.ndarray, labels: np.ndarray) -> Part:
    dtype = np.uint8 if images.dtype == "uint8" else np.float32
    return Part(torch.from_numpy(np.ascontiguousarray(images, dtype)), torch.from_numpy(labels.astype(np.int64)))
