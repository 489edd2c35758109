"""Parquet files in the layout of the Hugging Face hub: a column of encoded pictures, a column of labels."""

import json
import re
import warnings
from pathlib import Path

import torch

from fastadv._extras import require
from fastadv.data.pictures import Picture
from fastadv.data.source import Part, Source, joined

IMAGE_COLUMNS = ("image", "img", "pixel_values", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls")
_NEEDED = (
    f"a column {', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]} of encoded pictures (a struct with the fields "
    f"bytes and path, or binary) and a column {', '.join(LABEL_COLUMNS[:-1])} or {LABEL_COLUMNS[-1]} of integers or "
    "strings"
)
# How files begin (validation*.parquet too begins with val), and how folders of them are called.
_PARTS = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
_FOLDERS = ("", "data", "plain_text", "default")  # where the hub's sets have them


def find(folder: Path) -> dict[str, list[Path]]:
    """The files of each part in `folder` or its subfolder data, plain_text or default; empty where there are none.

    They are called train*.parquet, or lie in a folder train; those of the other parts likewise.

    Raises:
        ValueError: shards are missing, or there are parquet files, and none of them is train*.parquet.
    """
    for place in (folder / name for name in _FOLDERS):
        found = {part: sorted(place.glob(f"{part}*.parquet")) for part in _PARTS}
        if not any(found.values()):
            found = {
                part: sorted(path for name in names for path in place.glob(f"{name}/*.parquet"))
                for part, names in _PARTS.items()
            }
        if found["train"]:
            for paths in found.values():
                _check_shards(paths)
            return {part: paths for part, paths in found.items() if paths}
        others = sorted(path.name for path in place.glob("*.parquet"))
        if others:
            raise ValueError(f"{place} has parquet files ({', '.join(others[:5])}), but no train*.parquet")
    return {}


def read(files: dict[str, list[Path]]) -> Source:
    """The set in these files; the classes' names are in the files' metadata, else they are the labels.

    Where all labels of a part besides the training part are -1, as where the hub keeps them secret, it is left out with
    a warning.

    Raises:
        ValueError: a file is damaged or has another layout.
    """
    shards = {part: [_shard(path) for path in paths] for part, paths in files.items()}
    for part in [part for part, found in shards.items() if part != "train" and all(map(_unlabelled, found))]:
        warnings.warn(f"{files[part][0]} has the label -1 alone: the part is left out, it has no labels", stacklevel=4)
        del shards[part]
    kinds = {type(label) for found in shards.values() for _, labels in found for label in labels}
    if len(kinds) > 1:
        raise ValueError(f"the labels in {files['train'][0].parent} are integers in some files and strings in others")
    texts = {label for _, labels in shards["train"] for label in labels} if str in kinds else ()
    names = tuple(sorted(texts)) or _class_names(files["train"][0])
    parts = {
        part: joined(
            [
                Part(images, _numbers(labels, names, path))
                for (images, labels), path in zip(found, files[part], strict=True)
            ]
        )
        for part, found in shards.items()
    }
    highest = max(int(part.labels.max()) for part in parts.values() if len(part.labels))
    names = names or tuple(str(label) for label in range(1 + highest))
    if highest >= len(names):
        raise ValueError(f"{files['train'][0]} names {len(names)} classes, and there is a label {highest}")
    return Source(parts, names)


def _unlabelled(shard: tuple[list[Picture], list]) -> bool:
    return bool(shard[1]) and all(label == -1 for label in shard[1])


def _numbers(labels: list, names: tuple[str, ...], path: Path) -> torch.Tensor:
    """Labels int64 (N,); a text is one of the names."""
    number = {name: i for i, name in enumerate(names)}
    unknown = next((label for label in labels if isinstance(label, str) and label not in number), None)
    if unknown is not None:
        raise ValueError(f"{path} has the label {unknown!r}, which the training part lacks")
    values = torch.tensor([number[label] if isinstance(label, str) else label for label in labels], dtype=torch.int64)
    if len(values) and values.min() < 0:
        raise ValueError(f"{path} has the label {int(values.min())}: the images of this part have no labels")
    return values


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
    if image and label and _is_label(schema.field(label).type):
        kind = schema.field(image).type
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if types.is_binary(kind) or types.is_large_binary(kind):
            return image, label
    found = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise ValueError(f"{path} needs {_NEEDED}; its columns are {found}")


def _is_label(kind) -> bool:
    types = require("pyarrow").types
    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)


def _shard(path: Path) -> tuple[list[Picture], list[int] | list[str]]:
    """The pictures and labels of a file."""
    with _open(path) as file:
        image, label = _columns(file.schema_arrow, path)
        try:
            table = file.read(columns=[image, label])
        except (require("pyarrow").ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): get it again") from error
    labels = table.column(label).to_pylist()
    pictures = [_picture(path, row, value) for row, value in enumerate(table.column(image).to_pylist())]
    for name, values in ((image, pictures), (label, labels)):
        missing = sum(value is None for value in values)
        if missing:
            raise ValueError(f"{path}: {missing} of {len(values)} values of the column {name} are missing")
    return pictures, labels


def _picture(path: Path, row: int, value: bytes | dict | None) -> Picture | None:
    """A row's picture: its bytes, or the file that it names, relative to the parquet file; None: neither is there."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is not None:
        return Picture(f"{path}, row {row}", content)
    named = value.get("path") if isinstance(value, dict) else None
    return Picture(str(path.parent / named)) if named and (path.parent / named).is_file() else None
