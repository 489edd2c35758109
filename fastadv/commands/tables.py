"""Predictions as a table, CSV or JSON, that can be read whatever pictures and classes are called."""

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

from fastadv.attacks.verdicts import NONE

ENDINGS = (".csv", ".json")
Write = Callable[[str, Sequence[float] | None, int, str | None], None]  # picture, probabilities, class, error


def table_file(text: str) -> Path:
    """A path for `table`.

    Raises:
        argparse.ArgumentTypeError: its ending is that of another kind of file.
    """
    path = Path(text)
    if path.suffix and path.suffix.lower() not in ENDINGS:
        raise argparse.ArgumentTypeError(f"{text} must end in {' or '.join(ENDINGS)}, to say which file it is to be")
    return path


@contextmanager
def table(path: Path | None, classes: Sequence[str], top: int | None) -> Iterator[Write]:
    """Open a table; inside, `write(picture, probabilities, class, error)` writes a row.

    CSV has the columns picture, class, probability, then a probability for each class, or class_2, probability_2, ...
    for the `top` most probable, and error. JSON is a list of objects {"picture", "class", "probability",
    "probabilities": {class: probability}, "error"}, with null for what is missing.

    A byte of a file's name that is not UTF-8, 0xe9, is written as \\udce9. JSON readers make of it the name that
    Python has for the file, of which os.fsencode gives the bytes; in CSV it is text.

    Args:
        path: a .json file, else CSV; a missing folder is made. None means CSV to the terminal.
        classes: their names.
        top: how many classes a row has; None means all in their order.

    Raises:
        OSError: the file cannot be written.
        ValueError: a class has the name of another column of the CSV.
    """
    as_json = path is not None and path.suffix.lower() == ".json"
    taken = [] if as_json or top is not None else sorted({"picture", "class", "probability", "error"} & set(classes))
    if taken:
        raise ValueError(
            f"classes are called {', '.join(taken)}, as other columns of the CSV are: take --top-k, or a .json file"
        )
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "w", newline="", encoding="utf-8") if path else nullcontext(sys.stdout) as file:
            rows = _json_rows if as_json else _csv_rows
            with rows(file, classes, top) as write:
                yield write
    except OSError as error:
        if path and error.errno is not None and error.filename is None:
            error.filename = str(path)  # the error of a full disk does not name the file
        raise


@contextmanager
def _csv_rows(file: TextIO, classes: Sequence[str], top: int | None) -> Iterator[Write]:
    writer = csv.writer(file)
    more = classes if top is None else [f"{name}_{i}" for i in range(2, top + 1) for name in ("class", "probability")]
    writer.writerow(("picture", "class", "probability", *more, "error"))

    def write(picture: str, shares: Sequence[float] | None, best: int, error: str | None) -> None:
        cells: Sequence[str]
        if shares is None:
            cells = ("", "", *("" for _ in more))
        elif top is None:
            cells = (*_best(classes, shares, best), *(f"{share:.6f}" for share in shares))
        elif best == NONE:
            cells = (*_best(classes, shares, best), *("" for _ in more))
        else:
            cells = [cell for i in _order(shares)[:top] for cell in (classes[i], f"{shares[i]:.6f}")]
        writer.writerow([_readable(str(cell)) for cell in (picture, *cells, error or "")])

    yield write


def _best(classes: Sequence[str], shares: Sequence[float], best: int) -> tuple[str, str]:
    return ("no prediction", "") if best == NONE else (classes[best], f"{shares[best]:.6f}")


@contextmanager
def _json_rows(file: TextIO, classes: Sequence[str], top: int | None) -> Iterator[Write]:
    before = "[\n"

    def write(picture: str, shares: Sequence[float] | None, best: int, error: str | None) -> None:
        nonlocal before
        chosen = range(len(classes)) if top is None else _order(shares or ())[:top]
        row = {
            "picture": picture,
            "class": None if best == NONE else classes[best],
            "probability": None if best == NONE or shares is None else shares[best],
            "probabilities": None if shares is None else {classes[i]: _number(shares[i]) for i in chosen},
            "error": error,
        }
        file.write(before + json.dumps(row, allow_nan=False))
        before = ",\n"

    try:
        yield write
    finally:  # the rows so far can be read, also where a later picture stopped the command
        file.write("[]\n" if before == "[\n" else "\n]\n")


def _order(shares: Sequence[float]) -> list[int]:
    """Classes from the most probable one on, of equal ones the lower first, as a prediction is the lower one."""
    return sorted(range(len(shares)), key=lambda i: -shares[i])


def _number(share: float) -> float | None:
    return share if math.isfinite(share) else None  # JSON knows no NaN


def _readable(text: str) -> str:
    """A text that UTF-8 can hold."""
    return text.encode("utf-8", "backslashreplace").decode()
