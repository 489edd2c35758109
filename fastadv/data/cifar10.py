"""CIFAR-10, from parquet files or from the archives of its home page (Krizhevsky 2009)."""

import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastadv.data import parquet
from fastadv.data.source import DataSource, Part

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SHAPE = (3, 32, 32)
# Kind: the archive, the folder in it, and a file name's ending.
_ARCHIVES = {
    "binary": ("cifar-10-binary.tar.gz", "cifar-10-batches-bin", ".bin"),
    "python": ("cifar-10-python.tar.gz", "cifar-10-batches-py", ""),
}
_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}


def cifar10(folder: str | Path | None) -> DataSource:
    """The set in `folder` or its subfolder cifar10; None means the variable FASTADV_DATA, else ./data.

    Raises:
        FileNotFoundError: it is not there; the message says what to get.
        ValueError: a file is damaged or has another layout.
    """
    folder = Path(folder if folder is not None else os.environ.get("FASTADV_DATA") or "data")
    for place in (folder / "cifar10", folder):
        files = parquet.find(place)
        if files:
            return _checked_source(parquet.read(files, names=CLASSES), place)
        for kind, (archive, inner, ending) in _ARCHIVES.items():
            batches = _from_folder(place, inner, ending) or _from_archive(place / archive, ending)
            if batches:
                return _source(batches, _binary if kind == "binary" else _python)
    raise FileNotFoundError(
        f"CIFAR-10 is not in {folder / 'cifar10'} nor in {folder}: put there either train-00000-of-00001.parquet and "
        "test-00000-of-00001.parquet (the parquet files of the data set cifar10 from the Hugging Face hub) or "
        "cifar-10-binary.tar.gz (from the data set's home page), or give the folder that has them"
    )


def _checked_source(source: DataSource, place: Path) -> DataSource:
    if source.classes != CLASSES:
        raise ValueError(f"the parquet files in {place} are not CIFAR-10: their classes are {source.classes[:12]}")
    if "test" not in source.parts:
        raise ValueError(f"CIFAR-10 is not complete: {place} has no test*.parquet; get it too")
    return source


def _from_folder(place: Path, inner: str, ending: str) -> dict[str, bytes]:
    """The batches by name; empty where none is there."""
    names = [name + ending for part in _BATCHES.values() for name in part]
    folder = next((path for path in (place / inner, place) if (path / names[0]).is_file()), None)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()} if folder else {}


def _from_archive(path: Path, ending: str) -> dict[str, bytes]:
    if not path.is_file():
        return {}
    names = {name + ending for part in _BATCHES.values() for name in part}
    try:
        with tarfile.open(path) as archive:
            files = ((Path(member.name).name, archive.extractfile(member)) for member in archive if member.isfile())
            return {name: file.read() for name, file in files if file is not None and name in names}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from error


def _source(batches: dict[str, bytes], decode: Callable[[str, bytes], tuple[np.ndarray, np.ndarray]]) -> DataSource:
    found = {name.removesuffix(".bin"): content for name, content in batches.items()}
    missing = [name for part in _BATCHES.values() for name in part if name not in found]
    if missing:
        raise ValueError(f"CIFAR-10 is not complete: {', '.join(missing)} missing; get it again")
    parts = {}
    for part, names in _BATCHES.items():
        images, labels = zip(*(decode(name, found[name]) for name in names), strict=True)
        parts[part] = Part(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))
    return DataSource(parts, CLASSES)


def _binary(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a byte for the label and 3,072 for the pixels."""
    row = 1 + int(np.prod(_SHAPE))
    if not content or len(content) % row:
        raise ValueError(f"{name}.bin is damaged ({len(content)} bytes, no multiple of {row}): get it again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, row)
    return _checked(name, rows[:, 1:], rows[:, 0])


def _python(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A pickle of {b"data": uint8 (N, 3072), b"labels": list of N ints}."""
    try:
        values = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        return _checked(name, np.asarray(values[b"data"]), np.asarray(values[b"labels"]))
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is not a batch of CIFAR-10, or it is damaged ({error}): get it again") from error


def _checked(name: str, pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), int(np.prod(_SHAPE))):
        raise ValueError(f"{name} holds {pixels.dtype} {pixels.shape} for {labels.shape} labels: get it again")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise ValueError(f"{name} has labels that are not 0 to 9: get it again")
    return pixels.reshape(-1, *_SHAPE), labels.astype(np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy's arrays, and refuses whatever else a pickle may call."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # wherever this NumPy has it
        if (module, name) == ("_codecs", "encode"):  # bytes, in pickles of protocol 2
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which no array needs")
