"""The time of training, measured and as the cost model foretold it, as ratios to another training attack."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

from fastadv.study.results import PGD, Result, row_of


@dataclass(frozen=True)
class Time:
    """The time of a method with an attack, as the median ratio to the cells that differ in the attack alone.

    Attributes:
        method: what trained.
        attack: what attacked in training.
        to_pgd: the measured ratio to PGD; None where there is no pair that was made on one machine.
        predicted_to_pgd: the same by the cost model.
        to_none: the measured ratio to training without an attack; None likewise.
        predicted_to_none: the same by the cost model.
        pairs: how many there are with PGD.
    """

    method: str
    attack: str
    to_pgd: float | None
    predicted_to_pgd: float | None
    to_none: float | None
    predicted_to_none: float | None
    pairs: int


def times(results: Iterable[Result]) -> list[Time]:
    """For each method and attack, in the order in which they are met."""
    results = list(results)
    by_row = {(row_of(each), each.cell.seed, each.cell.attack): each for each in results}
    found = []
    for method, attack in dict.fromkeys((each.cell.method, each.cell.attack) for each in results):
        mine = [each for each in results if (each.cell.method, each.cell.attack) == (method, attack)]
        ratios = []
        for other in (PGD, "none"):
            partners = [(each, by_row.get((row_of(each), each.cell.seed, other))) for each in mine]
            pairs = [(a, b) for a, b in partners if b is not None and _comparable(a, b)]
            ratios.append((_ratio(pairs, _seconds), _ratio(pairs, _units), len(pairs)))
        (to_pgd, foretold, count), (to_none, foretold_none, _) = ratios
        found.append(Time(method, attack, to_pgd, foretold, to_none, foretold_none, count))
    return found


def _comparable(a: Result, b: Result) -> bool:
    """Made on one machine from beginning to end, on the same threads."""
    return a.record["machine"] == b.record["machine"] and "before" not in a.record["machine"]


def _ratio(pairs: Iterable[tuple[Result, Result]], measure: Callable[[Result], float]) -> float | None:
    found = [measure(a) / measure(b) for a, b in pairs if measure(b) > 0]
    return median(found) if found else None


def _seconds(result: Result) -> float:
    """Processor time on a CPU, which other cells lengthen less than the seconds; seconds on another device."""
    on_cpu = result.record["machine"]["device"] == "cpu"
    seconds: float = result.record["train_cpu_s" if on_cpu and "train_cpu_s" in result.record else "train_s"]
    return seconds


def _units(result: Result) -> float:
    """Forward passes of the whole training, by the cost model."""
    units: float = result.record["cost"]["units"] * len(result.epochs) * result.record["images"]["train"]
    return units
