"""Images to train and attack on: CIFAR-10 where there is a copy, else scikit-learn's digits, enlarged."""

import io
import os
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from fastadv.data import load


def cifar10(folder, part, count):
    """The first images of train.parquet or test.parquet, uint8 (N, 3, 32, 32), and their labels."""
    import numpy as np
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(Path(folder) / f"{part}.parquet").slice(0, count)
    rows = table.column("image").to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(table.column("label").to_pylist())


def digits(part, count):
    """The same of the digits, floats."""
    images, labels = getattr(load("digits"), part)
    return interpolate(images[:count], (32, 32)).repeat(1, 3, 1, 1), labels[:count]


def found(train, test):
    """(name, eps, so many training images, so many test images); CIFAR-10's folder is FASTADV_CIFAR10.

    The budgets are those at which a network can be made robust, but not for every image.
    """
    folder = os.environ.get("FASTADV_CIFAR10")
    if folder:
        return "CIFAR-10", 8 / 255, cifar10(folder, "train", train), cifar10(folder, "test", test)
    return "digits", 64 / 255, digits("train", train), digits("test", test)
