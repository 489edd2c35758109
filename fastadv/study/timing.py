"""The time of training with an attack as a ratio to another attack's: measured, and predicted by the cost model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from fastadv.study.partners import Setup, pgd_of, setup_of, standing
from fastadv.study.results import PGD, Result, grouped


@dataclass(frozen=True)
class Time:
    """The training time of a method with an attack, as the median ratio over pairs of cells.

    The two cells of a pair differ in nothing but the training attack and the epochs. Where both were trained again
    alone on one machine, these times count, the shortest of each. Elsewhere times count of pairs that were made on the
    same machine; cells that shared a GPU with others are left out: they waited for it. A ratio is None where there is
    no pair.

    Attributes:
        model: the model.
        method: the fine-tuning method.
        attack: the training attack.
        to_pgd: the measured ratio to PGD.
        predicted_to_pgd: the ratio to PGD by the cost model.
        to_none: the measured ratio to training without an attack.
        predicted_to_none: the ratio to training without an attack by the cost model.
        pairs: the number of pairs with PGD whose times count.
        retimed: the processor or GPU on which cells were trained again, alone, where a ratio is theirs; else None.
    """

    model: str
    method: str
    attack: str
    to_pgd: float | None
    predicted_to_pgd: float | None
    to_none: float | None
    predicted_to_none: float | None
    pairs: int
    retimed: str | None


def times(results: Iterable[Result]) -> list[Time]:
    """The times of each method with each attack, in the order in which `results` has them."""
    results = list(results)
    partners, found = _partners(results), []
    for names, mine in grouped(results, _names):
        pgd, none = (_pairs(mine, other, partners) for other in (PGD, "none"))
        found.append(
            Time(
                *names,
                to_pgd=retimed(pgd) or measured(pgd),
                predicted_to_pgd=predicted(pgd) if pgd else None,
                to_none=retimed(none) or measured(none),
                predicted_to_none=predicted(none) if none else None,
                pairs=sum(map(_both_retimed, pgd)) or sum(_comparable(*pair) for pair in pgd),
                retimed=next((_place(a) for a, b in [*pgd, *none] if _both_retimed((a, b))), None),
            )
        )
    return found


def retimed_to_none(results: Iterable[Result]) -> dict[tuple[str, str, str], float | None]:
    """{(model, method, attack): the ratio to training without an attack of `retimed`}."""
    results = list(results)
    partners = _partners(results)
    return {names: retimed(_pairs(mine, "none", partners)) for names, mine in grouped(results, _names)}


def _names(result: Result) -> tuple[str, str, str]:
    return result.cell.model, result.cell.method, result.cell.attack


def _partners(results: Iterable[Result]) -> dict[tuple[Setup, int, str], Result]:
    """{(setup, seed, PGD or "none"): the cell that others are compared with}."""
    partners: dict[tuple[Setup, int, str], Result] = {}
    for setup, group in grouped(results, setup_of):
        for other in (PGD, "none"):
            name = pgd_of(group) if other == PGD else standing(group, other)[0]
            partners |= {(setup, each.cell.seed, other): each for each in group if each.cell.attack == name}
    return partners


def _pairs(
    results: Iterable[Result], other: str, partners: Mapping[tuple[Setup, int, str], Result]
) -> list[tuple[Result, Result]]:
    found = [(each, partners.get((setup_of(each), each.cell.seed, other))) for each in results]
    return [(a, b) for a, b in found if b is not None]


def retimed(pairs: Iterable[tuple[Result, Result]]) -> float | None:
    """As `measured`, of cells that were trained again alone, on one machine and by one code; the shortest times count.

    What lengthens a training differs from one to the next, so that the shortest is nearest to what it takes. Of each
    cell as many trainings count as both have: of more the shortest is shorter.
    """
    found = []
    for one, other in (map(_again, pair) for pair in pairs if _both_retimed(pair)):
        count = min(len(one), len(other))
        found.append(min(one[:count]) / min(other[:count]))
    return median(found) if found else None


def measured(pairs: Iterable[tuple[Result, Result]]) -> float | None:
    """The time of the first cells' training as a multiple of the second ones': the median over the pairs.

    Only pairs count that were made on one machine from beginning to end, on as many threads, a GPU each alone; without
    any it is None.
    """
    found = [_seconds(a) / _seconds(b) for a, b in pairs if _comparable(a, b) and _seconds(b) > 0]
    return median(found) if found else None


def predicted(pairs: Iterable[tuple[Result, Result]]) -> float:
    """The same by the cost model, over all pairs, of which there must be one."""
    return median(_units(a) / _units(b) for a, b in pairs)


def _both_retimed(pair: tuple[Result, Result]) -> bool:
    a, b = (each.retimed for each in pair)
    return a is not None and b is not None and all(a[name] == b[name] for name in ("machine", "commit"))


def _place(result: Result) -> str | None:
    machine = result.retimed["machine"] if result.retimed else {"device": None}
    name: str | None = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    return name


def _again(result: Result) -> list[float]:
    times: Any = result.retimed
    seconds: list[float] = times["train_cpu_s" if times["machine"]["device"] == "cpu" else "train_s"]
    return seconds


def _comparable(a: Result, b: Result) -> bool:
    return a.time_counts and a.record["machine"] == b.record["machine"]


def _seconds(result: Result) -> float:
    """The time of the training: on a CPU processor time, which other cells at work lengthen less; else seconds."""
    on_cpu = result.record["machine"]["device"] == "cpu"
    seconds: float = result.record["train_cpu_s" if on_cpu and "train_cpu_s" in result.record else "train_s"]
    return seconds


def _units(result: Result) -> float:
    """The cost of the whole training by the cost model, in forward passes of one image."""
    units: float = result.record["cost"]["units"] * len(result.epochs) * result.record["images"]["train"]
    return units
