"""Parquet files in the layout of the Hugging Face hub: a column of encoded pictures, a column of labels."""

import json
import re
from pathlib import Path

import numpy as np
import torch

from fastadv._extras import require
from fastadv.data.pictures import Picture
from fastadv.data.source import Part, Source, joined

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
_NEEDED = (
    "a column image or img of encoded pictures (a struct with the field bytes, or binary) "
    f"and a column {', '.join(LABEL_COLUMNS[:-1])} or {LABEL_COLUMNS[-1]} of integers"
)
_PARTS = ("train", "val", "test")  # validation*.parquet too begins with val
_FOLDERS = ("", "data", "plain_text")  # where the hub's sets have them


def find(folder: Path) -> dict[str, list[Path]]:
    """The files of each part in `folder` or its subfolder data or plain_text, in order; empty where there are none.

    Raises:
        ValueError: shards are missing, or there are parquet files, and none of them is train*.parquet.
    """
    for place in (folder / name for name in _FOLDERS):
        found = {part: sorted(place.glob(f"{part}*.parquet")) for part in _PARTS}
        if found["train"]:
            for paths in found.values():
                _check_shards(paths)
            return {part: paths for part, paths in found.items() if paths}
        others = sorted(path.name for path in place.glob("*.parquet"))
        if others:
            raise ValueError(f"{place} has parquet files ({', '.join(others[:5])}), but no train*.parquet")
    return {}


def read(files: dict[str, list[Path]]) -> Source:
    """The set in these files; the classes' names are in the files' metadata, else they are numbers.

    Raises:
        ValueError: a file is damaged or has another layout.
    """
    names = _class_names(files["train"][0])
    parts = {part: joined([_shard(path) for path in paths]) for part, paths in files.items()}
    highest = max(int(part.labels.max()) for part in parts.values() if len(part.labels))
    names = names or tuple(str(label) for label in range(1 + highest))
    if highest >= len(names):
        raise ValueError(f"{files['train'][0]} names {len(names)} classes, and there is a label {highest}")
    return Source(parts, names)


def _check_shards(paths: list[Path]) -> None:
    """`train-00000-of-00002.parquet` says how many there are."""
    matches = [re.search(r"-(\d+)-of-(\d+)\.parquet$", path.name) for path in paths]
    totals = {int(match[2]) for match in matches if match}
    if totals and totals != {len(paths)}:
        raise ValueError(f"{paths[0].parent} has {len(paths)} files like {paths[0].name}: some are missing or too many")


def _open(path: Path):
    try:
        return require("pyarrow.parquet").ParquetFile(path)
    except require("pyarrow").ArrowException as error:
        raise ValueError(f"{path} is not a parquet file, or it is damaged ({error}): get it again") from error


def _class_names(path: Path) -> tuple[str, ...]:
    with _open(path) as file:
        schema = file.schema_arrow
    _, label = _columns(schema, path)
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):  # no metadata, or none of the labels: they are optional
        return ()


def _columns(schema, path: Path) -> tuple[str, str]:
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    types = require("pyarrow").types
    if image and label and types.is_integer(schema.field(label).type):
        kind = schema.field(image).type
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if types.is_binary(kind) or types.is_large_binary(kind):
            return image, label
    found = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise ValueError(f"{path} needs {_NEEDED}; its columns are {found}")


def _shard(path: Path) -> Part:
    with _open(path) as file:
        image, label = _columns(file.schema_arrow, path)
        try:
            table = file.read(columns=[image, label])
        except (require("pyarrow").ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): get it again") from error
    images, labels = table.column(image), table.column(label)
    if require("pyarrow").types.is_struct(images.type):
        images = require("pyarrow.compute").struct_field(images, "bytes")
    for name, column in ((image, images), (label, labels)):
        if column.null_count:
            raise ValueError(f"{path}: {column.null_count} of {len(column)} values of the column {name} are missing")
    labels = torch.from_numpy(labels.to_numpy().astype(np.int64))
    if len(labels) and labels.min() < 0:
        raise ValueError(f"{path} has the label {int(labels.min())}: the images of this part have no labels")
    return Part([Picture(f"{path}, row {row}", data) for row, data in enumerate(images.to_pylist())], labels)
