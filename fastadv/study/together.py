"""What belongs together in one study: a name stands for one thing in all of its cells."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from fastadv.study.files import Record
from fastadv.study.grid import OF_THE_ATTACK, Cell, Task, differences, with_defaults

# A record's settings have entries that no grid has: digests of what was read on the machine that made the cell.
FOUND = {
    "contents": "images",
    "order": "images to train on, or an order of them,",
    "weights": "pretrained weights",
    "architecture": "networks",
    "file": "model files",
    "source": "source files of the function",
}
LATER = ("order", "architecture", "file", "source")  # those that cells of older versions do not have
_LIMITS = ("validation", "split_seed", "train_limit", "val_limit")


def check(task: Task, record: Record) -> None:
    """Refuse a finished cell that is not what the grid asks for.

    A setting that the record lacks did not exist yet when the cell was made, and had its default.

    Raises:
        ValueError: a setting differs; the message says which.
    """
    there = {**settings_of(task.cell, record["settings"]), **record["cell"]}
    if other := differences(there, {**task.settings, **asdict(task.cell)}):
        raise ValueError(
            f"the finished cell {task.cell.id} was made with other settings than the grid asks for, and differs in "
            f"{other}: choose another --out, or move its folder out of cells"
        )


def check_together(records: Iterable[Record]) -> None:
    """Refuse cells that use one name for different things.

    A name of a data set stands for the same images in the same parts; that of a model for the same weights; and that of
    an attack for what the trainer calls the same, with one model, method and eps also with the same settings. Seeds of
    one row differ in nothing else.

    Args:
        records: the cells' records, of which "cell" and "settings" are compared.

    Raises:
        ValueError: two cells do not belong in one study.
    """
    seen: dict[tuple[object, ...], tuple[Any, str]] = {}
    for record in records:
        cell = Cell(**record["cell"])
        for key, value, words in _meanings(cell, record["settings"]):
            before, other = seen.setdefault(key, (value, cell.id))
            if value != before:
                words = words.format(differences(before, value) if isinstance(value, dict) else "")
                raise ValueError(f"the cells {other} and {cell.id} {words}")


def settings_of(cell: Cell, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a record that a grid has."""
    return {name: value for name, value in with_defaults(cell, settings).items() if name not in FOUND}


def _meanings(cell: Cell, settings: Mapping[str, Any]) -> Iterator[tuple[tuple[object, ...], Any, str]]:
    """(what must be the same, its value in this cell, the words of the error) for each name that a cell uses."""
    own = settings_of(cell, settings)
    data, model = (cell.data, cell.classes), (cell.model, cell.data, cell.classes)
    keys: dict[str, tuple[object, ...]] = {
        "contents": data,
        "order": (*data, *(own[name] for name in _LIMITS)),
        "weights": model,
        "architecture": (*model, own["size"]),
        "file": (cell.model,),
        "source": (cell.model,),
    }
    for what, key in keys.items():
        if what in settings:
            words = f"have different {FOUND[what]} under the name {key[0]}: they do not belong in one study. Rename "
            yield (what, *key), settings[what], words + "one, or choose another --out"
    words = (
        f"use the name {cell.attack} for attacks with different settings, {{}}: give one of them another name in the "
        "grid, or choose another --out"
    )
    yield ("attack", cell.attack), {"trained_with": own["trained_with"]}, words
    attack = {name: own[name] for name in OF_THE_ATTACK}
    yield ("attack", cell.model, cell.method, cell.eps, cell.attack), attack, words
    words = "are to differ in the seed alone, and differ in {}: use the same settings, or choose another --out"
    yield ("seeds", *data, cell.model, cell.method, cell.attack, cell.eps), own, words
