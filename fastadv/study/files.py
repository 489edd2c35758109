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
    from yaml import Node

GRID, GRID_FORMAT = "study.yaml", 1
CELL, CELL_FORMAT, OLDEST_CELL = "cell.json", 2, 1  # format 1 has old names of settings
RETIMED, RETIMED_FORMAT = "retimed.json", 1
ERROR = "error.txt"

WHOLE: dict[str, type | tuple[type, ...]] = {  # what every record has
    **dict.fromkeys(("cell", "settings", "machine", "images", "verdicts", "cost"), dict),
    **{"records": list, "labels": str, "train_s": (int, float)},
}

MERGE = "tag:yaml.org,2002:merge"
# Those of YAML 1.2, but for numbers with leading zeros, which are text: classes may have such names.
NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}

Record = dict[str, Any]  # of a finished cell: its settings, results and times, as its file has them


def read_grid(path: str | Path) -> dict[str, Any]:
    """The grid in a YAML file. Numbers and booleans are those of YAML 1.2: 1e-3 is a number, and 010 and no are text.

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
        def compose_mapping_node(self, anchor: str | None) -> "Node":
            node: Node = super().compose_mapping_node(anchor)
            names = [_said(name) for name, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{path} says {name[1]} twice{node.start_mark}")
            # PyYAML 6.0.4 merges by the identity of texts, and may take the value that another one replaces.
            merged = [value for name, value in node.value if name.tag == MERGE]
            node.value = [(name, value) for name, value in node.value if name.tag != MERGE]
            for given in merged:
                for each in given.value if isinstance(given, yaml.SequenceNode) else [given]:
                    if not isinstance(each, yaml.MappingNode):
                        raise ValueError(f"{path}: << takes a mapping or a list of mappings{node.start_mark}")
                    there = {_said(name) for name, _ in node.value}
                    node.value = [pair for pair in each.value if _said(pair[0]) not in there] + node.value
            return node

    Loader.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("bool", "timestamp", *NUMBERS)]
        for first, forms in Loader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    _add_numbers(Loader)
    try:
        grid = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(grid, dict) or not all(isinstance(name, str) for name in grid):
        raise ValueError(f"{path} is no grid: it must have names and their values, such as `data: digits`")
    check_format(str(path), grid.pop("format", GRID_FORMAT), GRID_FORMAT)
    return grid


def _said(name: "Node") -> tuple[str, str]:
    return name.tag, str(name.value)


def _add_numbers(loader_or_dumper: Any) -> None:
    for kind, form in NUMBERS.items():
        loader_or_dumper.add_implicit_resolver(
            f"tag:yaml.org,2002:{kind}", re.compile(f"({form})$"), list("-+.0123456789")
        )


def write_grid(folder: Path, grid: Mapping[str, Any]) -> None:
    """Write the grid into the study's folder, in a file that `read_grid` reads.

    Raises:
        ImportError: PyYAML is not installed.
        OSError: the file cannot be written.
    """
    yaml = require("yaml")

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, name-defined]
        pass

    _add_numbers(Dumper)  # beside those of YAML 1.1: text that is a number in either is quoted
    plain = json.loads(json.dumps({"format": GRID_FORMAT, **grid}))
    write_atomically(folder / GRID, yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True).encode())


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
    record["settings"] = by_new_names(record["settings"], RENAMED, tell=False)
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


def read_retimed(folder: Path, id: str) -> Record | None:
    """The times of a cell that was trained again, alone: {"machine", "commit", "train_s", "train_cpu_s"}, or None.

    The last two are lists of seconds, one for each training.

    Raises:
        FormatError: another version of fastadv wrote it.
        ValueError: the file is damaged.
    """
    path = cell_folder(folder, id) / RETIMED
    try:
        found: Record = json.loads(path.read_text())
        check_format(str(path), found["format"], RETIMED_FORMAT)
        return {name: found[name] for name in ("machine", "commit", "train_s", "train_cpu_s")}
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and take the times again") from error


def write_retimed(folder: Path, id: str, found: Record) -> None:
    """Write the times of a cell that was trained again, alone."""
    content = json.dumps({**found, "format": RETIMED_FORMAT}) + "\n"
    write_atomically(cell_folder(folder, id) / RETIMED, content.encode())


def finished(folder: Path) -> Iterator[Record]:
    """The records of all finished cells, in the order of their names.

    Raises:
        FormatError: as `read_cell`.
        ValueError: likewise.
    """
    for path in sorted((folder / "cells").glob(f"*/{CELL}")):
        if (record := read_cell(folder, path.parent.name)) is not None:
            yield record
