"""A study's results as files: one HTML page that needs no other file, its numbers as JSON and CSV, its figures."""

import json
from pathlib import Path

from fastadv.files import write_atomically
from fastadv.study import drawings
from fastadv.study.numbers import numbers, rows, table
from fastadv.study.page import page
from fastadv.study.reading import read_study

PAGE, TABLE, NUMBERS, FIGURES = "report.html", "results.csv", "results.json", "figures"


def write_study(folder: Path) -> None:
    """Write report.html, results.json, results.csv and the figures (SVG and PNG) of the finished cells in `folder`.

    Where the study is not finished, the page and results.json say what is missing.

    Args:
        folder: the study's folder.

    Raises:
        ImportError: the `train` extra is not installed.
        OSError: a file cannot be written.
    """
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
        if path.name not in files:  # of an attack that is no longer in the study
            path.unlink()
