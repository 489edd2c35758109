"""The files in a study's folder: the grid, and a folder for each cell."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadv._extras import require
from fastadv._renamed import by_new_names
from fastadv.files import check_format, write_atomically
from fastadv.study.grid import ALWAYS, Cell
from fastadv.training.settings import RENAMED

if TYPE_CHECKING:
    from yaml import MappingNode

GRID, GRID_FORMAT = "study.yaml", 1
CELL, CELL_FORMAT, OLDEST_CELL = "cell.json", 2, 1  # format 1 has old names of settings
ERROR = "error.txt"

WHOLE: dict[str, type | tuple[type, ...]] = {  # what every record has
    **dict.fromkeys(("cell", "settings", "machine", "images", "verdicts", "cost"), dict),
    **{"records": list, "labels": str, "train_s": (int, float)},
}

Record = dict[str, Any]  # of a finished cell: its settings, results and times, as its file has them


def read_grid(path: str | Path) -> dict[str, Any]:
    """The grid in a YAML file. 1e-3 is a number there, as in YAML 1.2.

    Args:
        path: the file.

    Returns:
        {name: value}, without the format.

    Raises:
        ImportError: PyYAML is not installed.
        OSError: the file cannot be read.
        ValueError: the file is not YAML, is no grid, has another format, or has a name twice.
    """
    yaml = require("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        def construct_mapping(self, node: "MappingNode", deep: bool = False) -> object:
            names = [self.construct_object(name, deep=True) for name, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{path} says {name} twice{node.start_mark}")
            return super().construct_mapping(node, deep)

    _as_in_yaml_1_2(Loader)
    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        grid = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(grid, dict) or not all(isinstance(name, str) for name in grid):
        raise ValueError(f"{path} is no grid: it must have names and their values, such as `data: digits`")
    check_format(str(path), grid.pop("format", GRID_FORMAT), GRID_FORMAT)
    return grid


def _as_in_yaml_1_2(loader: Any) -> None:
    """Let true and false alone be booleans, so that `precision: no` is a name, and no date be anything but text."""
    kept = {
        first: [(tag, form) for tag, form in forms if not tag.endswith((":bool", ":timestamp"))]
        for first, forms in loader.yaml_implicit_resolvers.items()
    }
    loader.yaml_implicit_resolvers = kept
    loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )


def write_grid(folder: Path, grid: Mapping[str, Any]) -> None:
    """Write the grid into the study's folder, in a file that `read_grid` reads.

    Raises:
        ImportError: PyYAML is not installed.
        OSError: the file cannot be written.
    """
    plain = json.loads(json.dumps({"format": GRID_FORMAT, **grid}))
    write_atomically(folder / GRID, require("yaml").safe_dump(plain, sort_keys=False, allow_unicode=True).encode())


def cell_folder(folder: Path, id: str) -> Path:
    """The folder of a cell in the study's folder."""
    return folder / "cells" / id


def read_cell(folder: Path, id: str) -> Record | None:
    """The record of a finished cell; None where it is not finished.

    Raises:
        FormatError: another version of fastadv wrote it.
        ValueError: the file is damaged, or belongs to another cell.
    """
    path = cell_folder(folder, id) / CELL
    try:
        record: Record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the cell is run again") from error
    wrong = "it is no mapping" if not isinstance(record, dict) else ""
    if not wrong:
        check_format(str(path), record.get("format"), CELL_FORMAT, OLDEST_CELL)
        wrong = _lacking(record)
    if wrong:
        raise ValueError(f"{path} is no record of a finished cell, {wrong}: remove it, and the cell is run again")
    record["settings"] = by_new_names(record["settings"], RENAMED, warn=False)
    if (own := Cell(**record["cell"]).id) != id:
        raise ValueError(f"{path} is of the cell {own}: move that folder out of cells, or give it the cell's name")
    return record


def _lacking(record: Mapping[str, Any]) -> str:
    """What a record lacks, in words; empty where it is whole."""
    for name, kind in WHOLE.items():
        if not isinstance(record.get(name), kind) or record[name] in ({}, []):
            return f"it has no {name}"
    said, (count, *others) = record["verdicts"], {len(str(each)) for each in record["verdicts"].values()}
    absent = [judge for judge in ("clean", *ALWAYS) if judge not in said]
    if absent:
        return f"it has no verdicts of {', '.join(absent)}"
    if others or not count or any(set(str(each)) - {"0", "1"} for each in said.values()):
        return "its verdicts are not a 0 or 1 for each of the same images"
    return ""


def write_cell(folder: Path, id: str, record: Record) -> None:
    """Write the record of a finished cell; a process that dies meanwhile leaves no half-written file."""
    content = json.dumps({**record, "format": CELL_FORMAT}) + "\n"
    write_atomically(cell_folder(folder, id) / CELL, content.encode())


def finished(folder: Path) -> Iterator[Record]:
    """The records of all finished cells, in the order of their names.

    Raises:
        FormatError: as `read_cell`.
        ValueError: likewise.
    """
    for path in sorted((folder / "cells").glob(f"*/{CELL}")):
        if (record := read_cell(folder, path.parent.name)) is not None:
            yield record
