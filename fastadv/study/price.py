"""What a training attack costs, as a multiple of training without one, and what it brings, beside FGSM."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

from fastadv.study.partners import epochs_of, setup_of, standing
from fastadv.study.results import HEADLINE_JUDGE, Result, Row, grouped, row_of
from fastadv.study.statistics import Difference, compare, of_one_set
from fastadv.study.timing import measured, predicted, retimed_to_none

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
        by_seed: {seed of a cell: its accuracies on clean images and under PMA, shares in [0, 1]}; where the cells are
            compared with FGSM, the seeds that both have.
        time: the measured time of training: alone, where a cell of this method and attack was trained again so, be it
            of another row; None where neither, and the cells were not made on one machine.
        predicted: the time by the cost model.
        difference: the accuracy under PMA minus that of the cells trained with `against`; None for these, for training
            without an attack, and where there are none.
        agreement: the share of stored signs that the gradients of the next epoch have too, the mean over the epochs
            after the first; None for other attacks.
    """

    row: Row
    shared: str
    attack: str
    standard: str
    against: str | None
    epochs: int
    by_seed: Mapping[int, tuple[float, float]]
    time: float | None
    predicted: float
    difference: Difference | None
    agreement: float | None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the cells."""
        return tuple(self.by_seed)

    @property
    def clean(self) -> float:
        """The mean accuracy on clean images."""
        return self.over(self.seeds)[0]

    @property
    def robust(self) -> float:
        """The mean accuracy under PMA."""
        return self.over(self.seeds)[1]

    def over(self, seeds: Iterable[int]) -> tuple[float, float]:
        """The mean accuracies of some seeds."""
        clean, robust = zip(*(self.by_seed[seed] for seed in seeds), strict=True)
        return mean(clean), mean(robust)


@dataclass(frozen=True)
class Summary:
    """The prices of one attack on one data set with one model and method: means over eps, of seeds that all eps have.

    Attributes:
        row: the data set, model and method; its eps means nothing.
        attack: the training attack, by its name in the grid.
        standard: as in `Price`.
        against: as in `Price`.
        budgets: each eps.
        runs: the number of cells with these seeds; of all cells where no seed has each eps.
        time: the median of the measured times; None where one was not measured.
        predicted: the median of the times by the cost model.
        clean: the mean accuracy on clean images.
        robust: the mean accuracy under PMA.
        to_fgsm: (mean, low, high) of the difference to FGSM, with a 95 % interval; None where it is not compared.
        by_eps: that difference at each eps; None where it is not compared.
        agreement: as in `Price`, the mean.
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
    by_eps: tuple[float, ...] | None
    agreement: float | None


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
    times = retimed_to_none(results)
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
            _price(cells, of_standard, against, judged.get(attack), times[row.model, row.method, attack])
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
        shared = set.intersection(*(set(each.seeds) for each in group))
        seeds = [shared or each.seeds for each in group]
        shares = [each.over(some) for each, some in zip(group, seeds, strict=True)]
        clean, robust = map(mean, zip(*shares, strict=True))
        differences = [each.difference for each in group if each.difference is not None]
        compared = of_one_set(differences) if len(differences) == len(group) else None
        agreements = [each.agreement for each in group if each.agreement is not None]
        found.append(
            Summary(
                row=replace(one.row, eps=0.0),
                attack=one.attack,
                standard=one.standard,
                against=one.against,
                budgets=tuple(each.row.eps for each in group),
                runs=sum(map(len, seeds)),
                time=median(times) if len(times) == len(group) else None,
                predicted=median(each.predicted for each in group),
                clean=clean,
                robust=robust,
                to_fgsm=compared,
                by_eps=None if compared is None else tuple(each.mean for each in differences),
                agreement=mean(agreements) if agreements else None,
            )
        )
    return found


def _price(
    cells: Sequence[Result],
    standard: Sequence[Result],
    against: str | None,
    difference: Difference | None,
    time: float | None,
) -> Price:
    """The price of cells that differ in the seed alone."""
    cells = [each for each in cells if difference is None or each.cell.seed in difference.seeds]
    one, of_seed = cells[0], {each.cell.seed: each for each in standard}
    row, shared = setup_of(one)
    agreements = [epoch["agreement"] for each in cells for epoch in each.epochs[1:] if "agreement" in epoch]
    return Price(
        row=row,
        shared=shared,
        attack=one.cell.attack,
        standard=standard[0].cell.attack,
        against=against,
        epochs=epochs_of(one),
        by_seed={each.cell.seed: (each.accuracies["clean"], each.accuracies[HEADLINE_JUDGE]) for each in cells},
        time=time or measured((each, of_seed[each.cell.seed]) for each in cells if each.cell.seed in of_seed),
        predicted=predicted((each, standard[0]) for each in cells),
        difference=difference,
        agreement=mean(agreements) if agreements else None,
    )
