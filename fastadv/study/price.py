"""What a training attack costs, as a multiple of training without one, and what it brings, beside FGSM."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from fastadv.study.partners import epochs_of, setup_of, standing
from fastadv.study.results import HEADLINE_JUDGE, Result, Row, grouped, row_of
from fastadv.study.statistics import Difference, compare, of_one_set
from fastadv.study.timing import measured, predicted

REFERENCE = "fgsm"


@dataclass(frozen=True)
class Price:
    """The time and the accuracies of the cells of one row that were trained with one attack.

    Attributes:
        row: the data set, model, method and eps.
        shared: the settings that these cells share with those that they are compared with, as JSON.
        attack: the training attack, by its name in the grid.
        standard: the name of training without an attack, whose time is 1.
        against: the name of FGSM for as many epochs as `standard`; None where no cell has that.
        epochs: the epochs of training.
        seeds: the seeds of the cells: where they are compared with FGSM, those that both have.
        clean: the mean accuracy on clean images, a share in [0, 1].
        robust: the mean accuracy under PMA.
        time: the measured time of training; None where the cells were not made on one machine.
        predicted: the time by the cost model.
        difference: the accuracy under PMA minus that of the cells trained with `against`; None for these, for training
            without an attack, and where there are none.
    """

    row: Row
    shared: str
    attack: str
    standard: str
    against: str | None
    epochs: int
    seeds: tuple[int, ...]
    clean: float
    robust: float
    time: float | None
    predicted: float
    difference: Difference | None


@dataclass(frozen=True)
class Summary:
    """The prices of one attack on one data set with one model and method: means over eps.

    Attributes:
        row: the data set, model and method; its eps means nothing.
        attack: the training attack, by its name in the grid.
        standard: as in `Price`.
        against: as in `Price`.
        budgets: each eps.
        runs: the number of cells.
        time: the median of the measured times; None where one was not measured.
        predicted: the median of the times by the cost model.
        clean: the mean accuracy on clean images.
        robust: the mean accuracy under PMA.
        to_fgsm: (mean, low, high) of the difference to FGSM, with a 95 % interval; None where it is not compared.
    """

    row: Row
    attack: str
    standard: str
    against: str | None
    budgets: tuple[float, ...]
    runs: int
    time: float | None
    predicted: float
    clean: float
    robust: float
    to_fgsm: tuple[float, float, float] | None


def prices(results: Iterable[Result]) -> tuple[list[Price], list[str]]:
    """The prices of the training attacks, in each row that has cells trained without an attack.

    Cells are compared that differ in nothing but the attack, its settings and the number of epochs, seed by seed.

    Args:
        results: the finished cells.

    Returns:
        The prices, in the order of `results`; and a sentence for each row that cannot be compared.
    """
    found, refused = [], []
    results = list(results)
    priced = {row_of(each) for each in results if each.attack == "none"}
    for (row, _), group in grouped(results, setup_of):
        standard, problem = standing(group, "none")
        if standard is None:
            if row in priced:
                refused.append(problem or f"{group[0].cell.id}: no cell without an attack has the same settings")
            continue
        of_standard = [each for each in group if each.cell.attack == standard]
        against, problem = standing(group, REFERENCE, epochs_of(of_standard[0]))
        differences, problems = compare(group, against) if against else ([], [])
        judged = {each.attack: each for each in differences if each.judge == HEADLINE_JUDGE}
        found += [
            _price(cells, of_standard, against, judged.get(attack))
            for attack, cells in grouped(group, lambda each: each.cell.attack)
        ]
        refused += [*problems, *([problem] if problem else [])]
    return found, refused


def summaries(prices: Iterable[Price]) -> list[Summary]:
    """A summary of each attack on each data set with each model and method, in the order of `prices`."""
    found = []
    for _, group in grouped(
        prices, lambda each: (replace(each.row, eps=0.0), each.shared, each.attack, each.standard, each.against)
    ):
        one, times = group[0], [each.time for each in group if each.time is not None]
        differences = [each.difference for each in group if each.difference is not None]
        found.append(
            Summary(
                row=replace(one.row, eps=0.0),
                attack=one.attack,
                standard=one.standard,
                against=one.against,
                budgets=tuple(each.row.eps for each in group),
                runs=sum(len(each.seeds) for each in group),
                time=median(times) if len(times) == len(group) else None,
                predicted=median(each.predicted for each in group),
                clean=float(np.mean([each.clean for each in group])),
                robust=float(np.mean([each.robust for each in group])),
                to_fgsm=of_one_set(differences) if len(differences) == len(group) else None,
            )
        )
    return found


def _price(
    cells: Sequence[Result], standard: Sequence[Result], against: str | None, difference: Difference | None
) -> Price:
    """The price of cells that differ in the seed alone."""
    cells = [each for each in cells if difference is None or each.cell.seed in difference.seeds]
    one, of_seed = cells[0], {each.cell.seed: each for each in standard}
    clean, robust = (float(np.mean([each.accuracies[judge] for each in cells])) for judge in ("clean", HEADLINE_JUDGE))
    row, shared = setup_of(one)
    return Price(
        row=row,
        shared=shared,
        attack=one.cell.attack,
        standard=standard[0].cell.attack,
        against=against,
        epochs=epochs_of(one),
        seeds=tuple(each.cell.seed for each in cells),
        clean=clean,
        robust=robust,
        time=measured((each, of_seed[each.cell.seed]) for each in cells if each.cell.seed in of_seed),
        predicted=predicted((each, standard[0]) for each in cells),
        difference=difference,
    )
