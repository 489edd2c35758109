"""What training took, and what the cost model had foretold, as ratios to another training attack."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from fastadv.study.results import PGD, Result, row_of


@dataclass(frozen=True)
class Time:
    """Of a method and an attack: the median ratio to the cells that differ in the attack alone.

    Attributes:
        to_pgd, to_none: measured; None where there is no such pair, made on the same machine.
        predicted_to_pgd, predicted_to_none: by the cost model.
        pairs: with PGD.
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
            pairs = [(each, by_row.get((row_of(each), each.cell.seed, other))) for each in mine]
            pairs = [(a, b) for a, b in pairs if b is not None and _comparable(a, b)]
            ratios.append((_ratio(pairs, _seconds), _ratio(pairs, _units), len(pairs)))
        (to_pgd, foretold, count), (to_none, foretold_none, _) = ratios
        found.append(Time(method, attack, to_pgd, foretold, to_none, foretold_none, count))
    return found


def _comparable(a: Result, b: Result) -> bool:
    """Made on one machine from beginning to end, on the same threads."""
    return a.record["machine"] == b.record["machine"] and "before" not in a.record["machine"]


def _ratio(pairs, measure) -> float | None:
    found = [measure(a) / measure(b) for a, b in pairs if measure(b) > 0]
    return median(found) if found else None


def _seconds(result: Result) -> float:
    """Processor time on a CPU, which other cells beside it do not lengthen so much; seconds on another device."""
    on_cpu = result.record["machine"]["device"] == "cpu"
    return result.record["train_cpu_s" if on_cpu and "train_cpu_s" in result.record else "train_s"]


def _units(result: Result) -> float:
    """Of the whole training."""
    return result.record["cost"]["units"] * len(result.epochs) * result.record["images"]["train"]
