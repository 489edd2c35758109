"""Which cells are compared: those that differ in nothing but the training attack, its settings and the epochs."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from fastadv.study.grid import OF_THE_ATTACK
from fastadv.study.results import PGD, Result, Row, grouped, row_of, set_words
from fastadv.study.together import LATER
from fastadv.training import Settings

Setup = tuple[Row, str]

DEFAULTS = {name: value for name, value in asdict(Settings()).items() if name in OF_THE_ATTACK}


def setup_of(result: Result) -> Setup:
    """The row of a cell, and as JSON the settings in which a cell must be like those that it is compared with."""
    own = (*OF_THE_ATTACK, *LATER, "epochs")
    shared = {name: value for name, value in sorted(result.settings.items()) if name not in own}
    return row_of(result), json.dumps(shared)


def standing(group: Sequence[Result], attack: str, epochs: int | None = None) -> tuple[str | None, str | None]:
    """The cells of one setup that others are compared with.

    Args:
        group: the cells of the setup.
        attack: the trainer's name of the attack that they were trained with, with its default settings.
        epochs: for how many epochs; None: for as many as the grid says.

    Returns:
        (the attack's name in the grid, why there is none): a single name; or of several the one that is also the
        trainer's. Both are None where no cell was trained so.
    """
    names = {each.cell.attack for each in group if _is_plain(each, attack) and epochs in (None, epochs_of(each))}
    if attack in names or len(names) < 2:
        return (attack if attack in names else next(iter(names), None)), None
    listed = ", ".join(sorted(names))
    return None, f"{_place(group[0])}: {listed} are all {attack}; give one of them that name, to compare with it"


def pgd_of(group: Sequence[Result]) -> str | None:
    """The name in the grid of the PGD that cells of one row are compared with; None where none was trained so."""
    return PGD if any(each.cell.attack == PGD for each in group) else standing(group, PGD)[0]


def no_pgd(results: Iterable[Result]) -> str:
    """Why models trained with other attacks are not compared with PGD's, as the end of a sentence."""
    found = []
    for _, group in grouped(results, row_of):
        others = {each.cell.seed for each in group if each.attack not in ("none", PGD)}
        tuned = sorted({each.cell.attack for each in group if each.attack == PGD})
        name = pgd_of(group)
        if not others or not tuned:
            continue
        if name is None:
            _, problem = standing(group, PGD)
            own = f"{', '.join(tuned)} is PGD with settings of its own; to compare with it, name it pgd"
            found.append(problem or f"{_place(group[0])}: {own}")
        elif not others & {each.cell.seed for each in group if each.cell.attack == name}:
            found.append(f"{_place(group[0])}: the cells trained with {name} have other seeds")
        else:
            found.append(f"{_place(group[0])}: the cells cannot be compared with {name}'s, as is said below")
    more = f", and {len(found) - 1} more such rows" if len(found) > 1 else ""
    return found[0] + more if found else "no cell has a partner trained with PGD"


def epochs_of(result: Result) -> int:
    """The epochs that the cell was to have; a run that overfitted may have stopped before."""
    return int(result.settings["epochs"])


def _is_plain(result: Result, attack: str) -> bool:
    return result.attack == attack and all(result.settings[name] == value for name, value in DEFAULTS.items())


def _place(result: Result) -> str:
    cell = result.cell
    return f"{set_words(cell)} {cell.model} {cell.method} eps {cell.eps:g}"
