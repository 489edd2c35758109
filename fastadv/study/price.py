"""What a training attack costs, as a multiple of training without one, and what it brings, beside FGSM."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from fastadv.study.grid import OF_THE_ATTACK
from fastadv.study.results import Result, Row, grouped, row_of
from fastadv.study.statistics import Difference, compare
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
    """The prices of one attack with one method, over data sets, models and eps.

    Attributes:
        method: the fine-tuning method.
        attack: the training attack, by its name in the grid.
        rows: the number of prices that have a difference to FGSM.
        time: the median of their times.
        mean: the mean of their differences, a share in [-1, 1].
        least: the least of them.
        greatest: the greatest of them.
    """

    method: str
    attack: str
    rows: int
    time: float
    mean: float
    least: float
    greatest: float


def summaries(prices: Iterable[Price]) -> list[Summary]:
    """A summary of each method with each attack that is compared with FGSM, by method."""
    compared = [(each, each.difference.mean) for each in prices if each.difference is not None]
    found = []
    for method, of_method in grouped(compared, lambda pair: pair[0].row.method):
        for attack, pairs in grouped(of_method, lambda pair: pair[0].attack):
            means, time = [mean for _, mean in pairs], median(each.times for each, _ in pairs)
            found.append(Summary(method, attack, len(pairs), time, float(np.mean(means)), min(means), max(means)))
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
