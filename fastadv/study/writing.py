"""A study's results as files: one HTML page that needs no other file, its numbers as JSON and CSV, its figures."""

import json
import re
from pathlib import Path

from fastadv._extras import require
from fastadv.files import write_atomically
from fastadv.study import drawings
from fastadv.study.files import CELL, GRID
from fastadv.study.numbers import numbers, rows, table
from fastadv.study.page import page
from fastadv.study.reading import read_study

PAGE, TABLE, NUMBERS, FIGURES = "report.html", "results.csv", "results.json", "figures"
_FIGURE = re.compile(r"(difference|map|curves|price)-[0-9].*\.(svg|png)")  # the names that `drawings` gives


def check_out(folder: Path) -> None:
    """Refuse a folder that is no study and has files with the names of a report: they would be replaced.

    Args:
        folder: where the study is to be, or is.

    Raises:
        ValueError: the folder has such files, and neither a grid nor a cell.
    """
    if (folder / GRID).exists() or any((folder / "cells").glob(f"*/{CELL}")):
        return
    for name in (PAGE, TABLE, NUMBERS, FIGURES):
        if (folder / name).exists():
            raise ValueError(f"--out {folder} is no study and has a {name}: choose another")


def check_packages() -> None:
    """Refuse to begin cells whose report cannot be written.

    Raises:
        ImportError: a package for the statistics or the figures is missing or broken.
    """
    for module in ("scipy.stats", "matplotlib.figure", "matplotlib.patches"):
        require(module)


def write_study(folder: Path) -> None:
    """Write report.html, results.json, results.csv and the figures (SVG and PNG) of the finished cells in `folder`.

    Where the study is not finished, the page and results.json say what is missing.

    Args:
        folder: the study's folder.

    Raises:
        ImportError: the `train` extra is not installed.
        OSError: a file cannot be written.
        ValueError: as `check_out`.
    """
    check_out(folder)
    study = read_study(folder)
    drawn = drawings.drawn(study)
    write_atomically(folder / NUMBERS, (json.dumps(numbers(study), indent=1) + "\n").encode())
    write_atomically(folder / TABLE, table(rows(study.results)).encode("utf-8", "backslashreplace"))
    write_atomically(folder / PAGE, page(study, drawn).encode())
    files = {f"{name}.svg": drawing.svg.encode() for name, drawing in drawn.items()}
    files |= {f"{name}.png": drawing.png for name, drawing in drawn.items()}
    for name, content in files.items():
        write_atomically(folder / FIGURES / name, content)
    for path in [*(folder / FIGURES).glob("*.svg"), *(folder / FIGURES).glob("*.png")]:
        if path.name not in files and _FIGURE.fullmatch(path.name):  # of an attack that is no longer in the study
            path.unlink(missing_ok=True)
