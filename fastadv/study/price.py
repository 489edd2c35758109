"""What a training attack costs, as a multiple of training without one, and what it brings, beside FGSM."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from fastadv.study.grid import OF_THE_ATTACK
from fastadv.study.results import Result, Row, grouped, row_of
from fastadv.study.statistics import Difference, compare, of_one_set
from fastadv.study.timing import measured, predicted

REFERENCE = "fgsm"
JUDGE = "pma"


@dataclass(frozen=True)
class Price:
    """The time and the accuracies of the cells of one row that were trained with one attack.

    Attributes:
        row: the data set, model, method and eps.
        shared: the settings that these cells share with those that they are compared with, as JSON.
        attack: the training attack, by its name in the grid.
        epochs: the epochs of training.
        seeds: the seeds of the cells.
        clean: the mean accuracy on clean images, a share in [0, 1].
        robust: the mean accuracy under PMA.
        time: the measured time of training as a multiple of that without an attack; None where the cells were not made
            on one machine.
        predicted: the same by the cost model.
        against: the name of FGSM for as many epochs as training without an attack; None where no cell has that.
        difference: the accuracy under PMA minus that of the cells trained with `against`; None for these, for training
            without an attack, and where there are none.
    """

    row: Row
    shared: str
    attack: str
    epochs: int
    seeds: tuple[int, ...]
    clean: float
    robust: float
    time: float | None
    predicted: float
    against: str | None
    difference: Difference | None

    @property
    def times(self) -> float:
        """The measured time where there is one, else the predicted one."""
        return self.predicted if self.time is None else self.time


@dataclass(frozen=True)
class Summary:
    """The prices of one attack on one data set with one model and method: means over eps.

    Attributes:
        row: the data set, model and method; its eps means nothing.
        attack: the training attack, by its name in the grid.
        budgets: each eps.
        time: the median of the times.
        clean: the mean accuracy on clean images.
        robust: the mean accuracy under PMA.
        against: the name of the FGSM that it is compared with, or None.
        to_fgsm: (mean, low, high) of the difference to it, with a 95 % interval; None where it is not compared.
    """

    row: Row
    attack: str
    budgets: tuple[float, ...]
    time: float
    clean: float
    robust: float
    against: str | None
    to_fgsm: tuple[float, float, float] | None


def summaries(prices: Iterable[Price]) -> list[Summary]:
    """A summary of each attack on each data set with each model and method, in the order of `prices`."""
    found = []
    for (row, attack), group in grouped(prices, lambda each: (replace(each.row, eps=0.0), each.attack)):
        differences = [each.difference for each in group if each.difference is not None]
        found.append(
            Summary(
                row,
                attack,
                budgets=tuple(each.row.eps for each in group),
                time=median(each.times for each in group),
                clean=float(np.mean([each.clean for each in group])),
                robust=float(np.mean([each.robust for each in group])),
                against=group[0].against,
                to_fgsm=of_one_set(differences) if len(differences) == len(group) else None,
            )
        )
    return found


def prices(results: Iterable[Result]) -> tuple[list[Price], list[str]]:
    """The prices of the training attacks, in each row that has cells trained without an attack.

    Cells are compared that differ in nothing but the attack, its settings and the number of epochs, seed by seed.

    Args:
        results: the finished cells.

    Returns:
        The prices, in the order of `results`; and a sentence for each row that cannot be compared.
    """
    found, refused = [], []
    for _, group in grouped(results, lambda each: (row_of(each), _shared(each))):
        standard = [each for each in group if each.attack == "none"]
        standard = [each for each in standard if each.cell.attack == standard[0].cell.attack]
        if not standard:
            continue
        against = next((each.cell.attack for each in group if _is_reference(each, standard[0])), None)
        differences, problems = compare(group, against) if against else ([], [])
        judged = {each.attack: each for each in differences if each.judge == JUDGE}
        for attack, cells in grouped(group, lambda each: each.cell.attack):
            found.append(_price(cells, standard, against, judged.get(attack)))
        refused += problems
    return found, refused


def _shared(result: Result) -> str:
    """The settings in which a cell must not differ from those that it is compared with."""
    own = (*OF_THE_ATTACK, "epochs")
    return json.dumps({name: value for name, value in sorted(result.settings.items()) if name not in own})


def _is_reference(each: Result, standard: Result) -> bool:
    return each.attack == REFERENCE and len(each.epochs) == len(standard.epochs)


def _price(
    cells: Sequence[Result], standard: Sequence[Result], against: str | None, difference: Difference | None
) -> Price:
    """The price of cells that differ in the seed alone."""
    one, of_seed = cells[0], {each.cell.seed: each for each in standard}
    clean, robust = (float(np.mean([each.accuracies[judge] for each in cells])) for judge in ("clean", JUDGE))
    return Price(
        row=row_of(one),
        shared=_shared(one),
        attack=one.cell.attack,
        epochs=len(one.epochs),
        seeds=tuple(each.cell.seed for each in cells),
        clean=clean,
        robust=robust,
        time=measured((each, of_seed[each.cell.seed]) for each in cells if each.cell.seed in of_seed),
        predicted=predicted((each, standard[0]) for each in cells),
        against=against,
        difference=difference,
    )
