"""Sets that are arrays: scikit-learn's digits, and .npz files."""

import zipfile
import zlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastadv._extras import require
from fastadv._warnings import warn
from fastadv.data.source import DataSource, DigestedPart, Part, digests, judging

_HAIR = 1e-6  # by which rounding puts a float beyond [0, 1]
_REQUIRED = ("x_train", "y_train", "x_test", "y_test")


def digits(codes: bool) -> DataSource:
    """1,797 grey 8x8 images, one part: float32 in [0, 1], or uint8 if `codes`, with the same digests."""
    images, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8) / 16  # 16 is the brightest
    rounded = np.rint(255 * images).astype(np.uint8)
    source = _source({"x_train": rounded if codes else images, "y_train": labels})
    contents = digests(torch.from_numpy(rounded))
    train = source.parts["train"]
    return replace(source, parts={"train": DigestedPart(train.images, train.labels, contents)})


def npz(path: Path, judge: str | None = None) -> DataSource:
    """The set in an .npz file: x_train, y_train, x_test, y_test, and x_val and y_val if the file has them.

    Its classes are the labels that occur. Floats that rounding put beyond [0, 1], by 1e-6 at most, are clamped.

    Args:
        path: of the file.
        judge: None: for training; "test" or "all": to judge a model, see `judging`, which needs one part alone.

    Raises:
        ValueError: it is no such file, an array is missing, or images or labels are not as `fastadv.data.load` says.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in _keys(archive, judge) if key in archive}
            others = sorted(set(archive).difference(_keys(archive, "all")))
    except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not an .npz file of plain arrays: {error}") from error
    needed: tuple[str, ...] = _REQUIRED if judge is None else ()
    needed += tuple(f"{letter}{key[1:]}" for key in arrays for letter in "xy")
    for key in needed or _REQUIRED:
        if key not in arrays:
            raise ValueError(f"{path} has no array {key}; it needs {', '.join(_REQUIRED)}")
    if others:
        warn(f"{path}: left out, of no part: {', '.join(others)} (validation images are x_val, y_val)")
    images = {key: array for key, array in arrays.items() if key.startswith("x")}
    first = next(iter(images))
    for key, array in images.items():
        _check_images(f"{path}: {key}", array)
        if array.dtype.kind == "f":
            np.clip(array, 0, 1, out=array)
        _check_labels(f"{path}: y{key[1:]}", arrays["y" + key[1:]], len(array))
        arrays["y" + key[1:]] = arrays["y" + key[1:]].astype(np.int64)  # NumPy compares unsigned ones as floats
        if array.shape[1:] != images[first].shape[1:]:
            raise ValueError(f"{path}: {first} and {key} hold images of different shapes")
    return _source(arrays)


def _keys(archive: Collection[str], judge: str | None) -> list[str]:
    parts = [key[2:] for key in (*_REQUIRED[::2], "x_val") if key in archive or "y" + key[1:] in archive]
    return [f"{letter}_{part}" for part in judging(parts, judge) for letter in "xy"]


def _check_images(name: str, images: np.ndarray) -> None:
    key = name.rpartition(" ")[2]
    if images.dtype.kind != "f" and images.dtype != "uint8":
        raise ValueError(f"{name} must be uint8 or floating point, got {images.dtype}")
    if images.ndim != 4 or images.size == 0:
        hint = f": save {key}[:, None]" if images.ndim == 3 else ""
        raise ValueError(f"{name} must be images (N, C, H, W), got the shape {images.shape}{hint}")
    if _is_channels_last(*images.shape[1:]):
        count, height, width, channels = images.shape
        raise ValueError(
            f"{name} must be images (N, C, H, W), and {images.shape} is (N, H, W, C) as Keras has it: save "
            f"np.moveaxis({key}, -1, 1), of the shape {(count, channels, height, width)}"
        )
    if images.dtype.kind == "f" and not (images.min() >= -_HAIR and images.max() <= 1 + _HAIR):
        hint = f": save {key} / 255" if 0 <= images.min() and 2 < images.max() <= 255 else ""
        raise ValueError(f"{name} must be in [0, 1], got [{images.min():.9g}, {images.max():.9g}]{hint}")


def _is_channels_last(first: int, second: int, last: int) -> bool:
    """Whether an image of the shape (first, second, last) is (H, W, C) rather than (C, H, W).

    It is (C, H, W) where the first size is 1 or 3. Else the last size must be below the first, and either be 1, 3 or 4
    and below the second too, as in (28, 28, 1), or the first two be equal, as in (64, 64, 13).
    """
    return first not in (1, 3) and last < first and ((last in (1, 3, 4) and last < second) or first == second)


def _check_labels(name: str, labels: np.ndarray, count: int) -> None:
    key = name.rpartition(" ")[2]
    if labels.ndim == 2 and len(labels) == count:
        hint = f"{key}[:, 0]" if labels.shape[1] == 1 else f"{key}.argmax(1)"
        raise ValueError(f"{name} must be of shape ({count},), got {labels.shape}: save {hint}")
    if labels.dtype.kind not in "iu":
        whole = labels.dtype.kind in "fb" and bool((labels == np.rint(labels)).all())
        hint = f"{key}.astype(np.int64)" if whole else f"np.unique({key}, return_inverse=True)[1]"
        raise ValueError(f"{name} must be integers, got {labels.dtype}: save {hint}")
    if labels.shape != (count,):
        raise ValueError(f"{name} must be of shape ({count},), one for each image, got {labels.shape}")
    if labels.min() < 0:
        raise ValueError(
            f"{name} must not be negative, got {labels.min()}: number the classes from 0, and leave out images without "
            "a label"
        )
    if labels.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must be below 2^63, got {labels.max()}: number the classes from 0")


def _source(arrays: dict[str, np.ndarray]) -> DataSource:
    there = np.unique(np.concatenate([array for key, array in arrays.items() if key.startswith("y")]))
    parts = {
        key[2:]: _part(arrays[key], np.searchsorted(there, arrays["y" + key[1:]]))
        for key in arrays
        if key.startswith("x")
    }
    return DataSource(parts, tuple(map(str, there.tolist())))


def _part(images: np.ndarray, labels: np.ndarray) -> Part:
    dtype = np.uint8 if images.dtype == "uint8" else np.float32
    return Part(torch.from_numpy(np.ascontiguousarray(images, dtype)), torch.from_numpy(labels.astype(np.int64)))
