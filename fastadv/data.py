"""Data sets by name, or yours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastadv._extras import require
from fastadv.functional import random_init

_KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Data:
    """Images (N, C, H, W), float32 in [0, 1] or uint8; labels int64 (N,); a name for each class."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: tuple[str, ...]

    @property
    def train(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x_train, self.y_train

    @property
    def test(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x_test, self.y_test

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.x_train.shape[1:])


def load(name_or_path: str | Path, *, classes: Sequence[int] | None = None, seed: int = 0) -> Data:
    """A data set: "digits", or the path of an .npz file.

    Args:
        name_or_path: "digits" is scikit-learn's (1,797 grey 8x8 images; a quarter of each class is the test
            set, chosen by `seed`). An .npz file holds x_train, y_train, x_test, y_test: images (N, C, H, W),
            uint8 or floats in [0, 1]; integer labels (N,).
        classes: keep these only, relabelled 0, 1, ... in the order given.
        seed: of the split of "digits".

    Raises:
        FileNotFoundError: neither a known name nor a file.
        ImportError: the `train` extra is not installed.
        ValueError: the file's content is not as above, or it lacks one of the classes.
    """
    data = _digits(seed) if str(name_or_path) == "digits" else _npz(Path(name_or_path))
    return data if classes is None else _subset(data, classes)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Images as a model takes them: uint8 becomes float32 images / 255, floats stay as they are."""
    # The ops' own conversion: a division by 255 is not rounded correctly on every device.
    return random_init(images, 0.0, seed=0) if images.dtype == torch.uint8 else images


def _digits(seed: int) -> Data:
    images, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = require("sklearn.model_selection").train_test_split(
        images.reshape(-1, 1, 8, 8) / 16, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    return _as_data({"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test})


def _npz(path: Path) -> Data:
    if not path.is_file():
        raise FileNotFoundError(f"no data set or file called {str(path)!r}; give 'digits' or the path of an .npz file")
    try:
        archive = require("numpy").load(path, allow_pickle=False)
        arrays = {key: archive[key] for key in _KEYS if key in archive}
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not an .npz file of plain arrays: {error}") from error
    for key in _KEYS:
        if key not in arrays:
            raise ValueError(f"{path} has no array {key}; it needs {', '.join(_KEYS)}")
    for part in ("train", "test"):
        _check_images(f"{path}: x_{part}", arrays[f"x_{part}"])
        _check_labels(f"{path}: y_{part}", arrays[f"y_{part}"], len(arrays[f"x_{part}"]))
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise ValueError(f"{path}: x_train and x_test hold images of different shapes")
    return _as_data(arrays)


def _check_images(name: str, images) -> None:
    if images.dtype.kind != "f" and images.dtype != "uint8":
        raise ValueError(f"{name} must be uint8 or floating point, got {images.dtype}")
    if images.ndim != 4 or images.size == 0:
        raise ValueError(f"{name} must be images (N, C, H, W), got the shape {images.shape}")
    if images.dtype.kind == "f" and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{name} must be in [0, 1], got [{images.min():.4g}, {images.max():.4g}]")


def _check_labels(name: str, labels, count: int) -> None:
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(f"{name} must be of shape ({count},), one for each image, got {labels.shape}")
    if labels.min() < 0:
        raise ValueError(f"{name} must not be negative, got {labels.min()}")


def _as_data(arrays: dict) -> Data:
    tensors = {
        key: torch.from_numpy(array).to(
            torch.int64 if key.startswith("y") else torch.uint8 if array.dtype == "uint8" else torch.float32
        )
        for key, array in arrays.items()
    }
    count = 1 + int(max(tensors["y_train"].max(), tensors["y_test"].max()))
    return Data(**tensors, classes=tuple(str(label) for label in range(count)))


def _subset(data: Data, classes: Sequence[int]) -> Data:
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(f"classes must be different and at least one, got {list(classes)}")
    for label in classes:
        if not ((data.y_train == label).any() and (data.y_test == label).any()):
            raise ValueError(f"class {label} has no training or no test images; there are 0 to {len(data.classes) - 1}")
    return Data(
        *_select(*data.train, classes),
        *_select(*data.test, classes),
        classes=tuple(data.classes[label] for label in classes),
    )


def _select(images: torch.Tensor, labels: torch.Tensor, classes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    match = labels[:, None] == torch.tensor(classes)
    keep = match.any(dim=1)
    return images[keep], match[keep].long().argmax(dim=1)
