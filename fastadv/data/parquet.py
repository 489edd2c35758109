"""Parquet files in the layout of the Hugging Face hub: a column of encoded pictures, a column of labels."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastadv._extras import require
from fastadv._warnings import warn
from fastadv.data.pictures import Picture
from fastadv.data.source import DataSource, Part, concatenated, judging
from fastadv.data.walking import is_counted
from fastadv.names import distinct

if TYPE_CHECKING:
    from pyarrow import DataType, Schema
    from pyarrow.parquet import ParquetFile

Label = int | str | None  # of a row; None: it is missing

IMAGE_COLUMNS = ("image", "img", "pixel_values", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls")
_NEEDED = (
    f"a column {', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]} of encoded pictures (a struct with the fields "
    f"bytes and path, or binary) and a column {', '.join(LABEL_COLUMNS[:-1])} or {LABEL_COLUMNS[-1]} of integers or "
    "strings, or others that image_column and label_column name"
)
# How files begin (validation*.parquet too begins with val), and how folders of them are called.
_PARTS = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
_MORE = ("training", "trainval", "trainset", "valset", "testing", "testset")  # words that go on, and mean the same
_FOLDERS = ("", "data", "plain_text", "default")  # where the hub's sets have them


@dataclass(frozen=True)
class Columns:
    """The names of the columns; None: the first of those that are usual."""

    image: str | None = None
    label: str | None = None


def find(folder: Path, training: bool = True) -> dict[str, list[Path]]:
    """The files of each part in `folder` or its subfolder data, plain_text or default; empty where there are none.

    They are called train*.parquet, or lie in a folder train; those of the other parts likewise. Hidden files do not
    count. A name that goes on as another word does, such as values.parquet for val, is warned of.

    Args:
        folder: where to look.
        training: whether there must be a training part.

    Raises:
        ValueError: shards are missing, or there are parquet files, and none of them is train*.parquet (where it is not
            for `training`, none is of any part).
    """
    for place in (folder / name for name in _FOLDERS):
        named = {part: _below(place, f"{part}*.parquet") for part in _PARTS}
        inside = {part: _below(place, *(f"{name}/*.parquet" for name in names)) for part, names in _PARTS.items()}
        found = {part: named[part] or inside[part] for part in _PARTS}
        there = _below(place, "*.parquet")
        if found["train"] or (not training and any(found.values())):
            for part, paths in found.items():
                _check_shards(paths)
                _warn_of_words(part, [path for path in paths if path in named[part]])
            others = {*there, *itertools.chain(*inside.values())}.difference(*found.values())
            if others:
                warn(f"left out, of no part: {len(others)} files, such as {min(others)}")
            return {part: paths for part, paths in found.items() if paths}
        if there:
            names = ", ".join(path.name for path in there[:5])
            wanted = "train*.parquet" if training else "train*.parquet, test*.parquet or val*.parquet"
            raise ValueError(f"{place} has parquet files ({names}), but no {wanted}")
    return {}


def _below(place: Path, *patterns: str) -> list[Path]:
    """The files of these patterns, sorted; no hidden ones, which a pattern takes too."""
    return sorted(path for pattern in patterns for path in place.glob(pattern) if is_counted(path.name))


def _warn_of_words(part: str, paths: Sequence[Path]) -> None:
    """Warn where the names of a part's files begin with another word, or with two: their images may be the same."""
    first: dict[str, Path] = {}
    for path in paths:
        first.setdefault("".join(itertools.takewhile(str.islower, path.name)), path)
    known = {word: path for word, path in first.items() if word in (*_PARTS[part], *_MORE)}
    for word, path in first.items():
        if word not in known:
            warn(f"{path} is taken for the {part} part, by how its name begins: move it elsewhere if it is not")
    if len(known) > 1:
        names = " and ".join(path.name for path in known.values())
        warn(f"the {part} part has {names}, and images that are in both count twice: move one elsewhere if it has them")


def read(
    files: dict[str, list[Path]],
    columns: Columns = Columns(),
    names: tuple[str, ...] = (),
    judge: str | None = None,
) -> DataSource:
    """The set in these files; its classes are those that the files' metadata name, else the labels that there are.

    A part without labels is left out with a warning: all of them are -1, as where the hub keeps them secret, or null,
    or it has no column of labels.

    Args:
        files: of each part, as `find` returns them.
        columns: names of the columns of images and labels.
        names: of the classes, where the metadata have none.
        judge: None: for training; "test" or "all": to judge a model, see `judging`.

    Raises:
        ValueError: a file is damaged or has another layout; the training part, or every part, has no labels.
    """
    labels = {part: [_labels(path, columns) for path in files[part]] for part in judging(files, judge)}
    for part in [part for part, found in labels.items() if all(map(_is_unlabelled, found))]:
        what = f"the {part} part in {files[part][0].parent} has no labels (no rows, -1, null, or no such column)"
        if len(files) == 1 or (part == "train" and judge is None):
            raise ValueError(f"{what}: give files with labels, or the column that has them by label_column")
        warn(f"{what}: it is left out")
        return read({other: paths for other, paths in files.items() if other != part}, columns, names, judge)
    first = next(iter(labels))
    checked = _checked_labels(
        {path: found for part in labels for path, found in zip(files[part], labels[part], strict=True)}
    )
    naming = list(checked) if judge else files[first]  # of training, the training part's files alone
    texts = {label for path in naming for label in checked[path] if isinstance(label, str)}
    numbers = {label for found in checked.values() for label in found if not isinstance(label, str)}
    named = tuple(sorted(texts)) or _one_naming(checked, columns) or names
    if named and numbers and max(numbers) >= len(named):
        raise ValueError(f"{files[first][0]} names {len(named)} classes, and there is a label {max(numbers)}")
    label_of: dict[int | str, int] = {name: i for i, name in enumerate(named)} if texts else {}
    label_of |= {number: number if named else i for i, number in enumerate(sorted(numbers))}
    parts = {
        part: concatenated(
            [Part(_pictures(path, columns), _numbers(checked[path], label_of, path)) for path in files[part]]
        )
        for part in labels
    }
    return DataSource(parts, named or tuple(map(str, sorted(numbers))))


def _is_unlabelled(labels: list[Label] | None) -> bool:
    return labels is None or all(label == -1 or _is_missing(label) for label in labels)


def _is_missing(label: Label) -> bool:
    # In a table that was a CSV file, a missing text is often "".
    return label is None or (isinstance(label, str) and not label.strip())


def _checked_labels(labels: Mapping[Path, list[Label] | None]) -> dict[Path, list[int | str]]:
    """The labels of each file, none of which is missing or negative."""
    checked = {}
    for path, found in labels.items():
        if found is None:
            raise ValueError(f"{path} has no column of labels, which other files of its part have")
        checked[path] = [label for label in found if label is not None and not _is_missing(label)]
        missing = len(found) - len(checked[path])
        if missing:
            raise ValueError(f"{path}: {missing} of {len(found)} labels are missing: leave out those rows")
        least = min((label for label in checked[path] if not isinstance(label, str)), default=0)
        if least < 0:
            raise ValueError(f"{path} has the label {least}, of images without a label: leave out those rows")
    if len({type(label) for present in checked.values() for label in present}) > 1:
        folder = next(iter(labels)).parent
        raise ValueError(f"the labels in {folder} are integers in some files and strings in others")
    return checked


def _numbers(labels: Sequence[int | str], label_of: Mapping[int | str, int], path: Path) -> torch.Tensor:
    """Labels int64 (N,) of texts or numbers."""
    unknown = next((label for label in labels if label not in label_of), None)
    if unknown is not None:
        raise ValueError(f"{path} has the label {unknown!r}, which the training part lacks")
    return torch.tensor([label_of[label] for label in labels], dtype=torch.int64)


def _check_shards(paths: list[Path]) -> None:
    """`train-00000-of-00002.parquet` says how many there are; the hub's older ones go on with a hash."""
    shards = [match.groups() for path in paths if (match := re.search(r"-(\d+)-of-(\d+)(?!\d)", path.stem))]
    numbers, totals = sorted(int(number) for number, _ in shards), {int(total) for _, total in shards}
    count = len(paths)
    if shards and (totals != {count} or numbers not in (list(range(count)), list(range(1, count + 1)))):
        raise ValueError(f"{paths[0].parent} has {len(paths)} files like {paths[0].name}: some are missing or too many")


def _open(path: Path) -> "ParquetFile":
    try:
        return require("pyarrow.parquet").ParquetFile(path)
    except require("pyarrow").ArrowException as error:
        raise ValueError(f"{path} is not a parquet file, or it is damaged ({error}): get it again") from error


def _one_naming(paths: Iterable[Path], columns: Columns) -> tuple[str, ...]:
    """The names of the classes in the files' metadata, which number them alike; () where no file has any."""
    said = {path: names for path in paths if (names := _class_names(path, columns))}
    if len(set(said.values())) > 1:
        (one, first), *others = said.items()
        other, names = next((path, names) for path, names in others if names != first)
        number = next((i for i, pair in enumerate(zip(first, names, strict=False)) if len(set(pair)) > 1), None)
        what = f"{len(first)} and {len(names)} classes" if number is None else f"{first[number]} and {names[number]}"
        raise ValueError(
            f"{one} and {other} number their classes otherwise ({what}{'' if number is None else f' are {number}'}): "
            "write them again with one list of names"
        )
    return next(iter(said.values()), ())


def _class_names(path: Path, columns: Columns) -> tuple[str, ...]:
    with _open(path) as file:
        schema = file.schema_arrow
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return distinct(map(str, features[_label_column(schema, path, columns)]["names"]))
    except (KeyError, TypeError, ValueError):  # no metadata, or none of the labels: they are optional
        return ()


def _label_column(schema: "Schema", path: Path, columns: Columns) -> str | None:
    """The column of labels; None: there is none of a usual name."""
    if columns.label is None:
        column = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    else:
        column = _given(columns.label, schema, path)
    if column is not None and not _is_label(schema.field(column).type):
        raise ValueError(f"{path} needs {_NEEDED}; its columns are {_described(schema)}")
    return column


def _image_column(schema: "Schema", path: Path, columns: Columns) -> str:
    if columns.image is None:
        column = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    else:
        column = _given(columns.image, schema, path)
    types = require("pyarrow").types
    if column is not None:
        kind = schema.field(column).type
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if types.is_binary(kind) or types.is_large_binary(kind) or types.is_null(kind):  # null: where all are paths
            return column
    raise ValueError(f"{path} needs {_NEEDED}; its columns are {_described(schema)}")


def _given(column: str, schema: "Schema", path: Path) -> str:
    if column not in schema.names:
        raise ValueError(f"{path} has no column {column!r}; its columns are {_described(schema)}")
    return column


def _described(schema: "Schema") -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _is_label(kind: "DataType") -> bool:
    types = require("pyarrow").types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    known = (types.is_integer, types.is_boolean, types.is_string, types.is_large_string, types.is_null)
    return any(is_known(kind) for is_known in known)


def _labels(path: Path, columns: Columns) -> list[Label] | None:
    """The labels of a file; None: it has no column of them."""
    with _open(path) as file:
        _image_column(file.schema_arrow, path, columns)
        label = _label_column(file.schema_arrow, path, columns)
    return None if label is None else _column(path, label)


def _pictures(path: Path, columns: Columns) -> list[Picture]:
    with _open(path) as file:
        image = _image_column(file.schema_arrow, path, columns)
    return [_picture(path, row, value) for row, value in enumerate(_column(path, image))]


def _column(path: Path, name: str) -> list[Any]:
    with _open(path) as file:
        try:
            values: list[Any] = file.read(columns=[name]).column(name).to_pylist()
            return values
        except (require("pyarrow").ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): get it again") from error


def _picture(path: Path, row: int, value: bytes | dict[str, Any] | None) -> Picture:
    """A row's picture: its bytes, or the file that it names, relative to the parquet file; else it is empty."""
    content = value.get("bytes") if isinstance(value, dict) else value
    named = value.get("path") if isinstance(value, dict) else None
    if content is None and named:
        return Picture(str(path.parent / named))
    return Picture(f"{path}, row {row}", content or b"")
