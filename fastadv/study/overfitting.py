"""Catastrophic overfitting in the records of training: where, when, who saw it and how early."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from fastadv.study.files import Record
from fastadv.study.results import PGD, Result, row_of

HALF = 0.5
LEAST = 0.05  # of accuracy: less may be chance
DROP, GAP, ABNORMAL = 0.20, 0.20, 0.10

DEFINITION = (
    "A run has collapsed at the first epoch at which its accuracy under PGD-10 on the validation images is less than "
    f"half of what it could be, and more than {100 * LEAST:.0f} points below it, while of the monitor's images fewer "
    "than half as many withstand PGD-5 as the attack trained with. What it could be is its best so far or, if higher, "
    "at the same epoch that of the run trained with PGD from the same seed, unless that ends with one class for all "
    "images; where there is no such run, the accuracy under the attack trained with. The second condition tells "
    "catastrophic overfitting from a model that forgets, or overfits as any does."
)

Rule = Callable[[Sequence[float]], Iterable[bool]]  # from a field's values over the epochs to where it fires


@dataclass(frozen=True)
class Detector:
    """A rule that may see a collapse in the monitor's readings.

    Attributes:
        field: of an epoch's record; epochs without it do not count.
        rule: in words.
        fires: whether it does, for each value of the field.
    """

    field: str
    rule: str
    fires: Rule

    def first(self, epochs: Sequence[Record]) -> int | None:
        """The epoch at which it fires first, from 0."""
        seen = [each for each in epochs if self.has(each)]
        fired = self.fires([each[self.field] for each in seen])
        return next((each["epoch"] for each, fires in zip(seen, fired, strict=True) if fires), None)

    def has(self, record: Record) -> bool:
        """Whether an epoch's record has the field."""
        return record.get(self.field) is not None


def _fell(by: float) -> Rule:
    return lambda values: (best - value > by for value, best in zip(values, _highest(values), strict=True))


def _halved(values: Sequence[float]) -> Iterable[bool]:
    return (value < HALF * best for value, best in zip(values, _highest(values), strict=True))


def _above(threshold: float) -> Rule:
    return lambda values: (value > threshold for value in values)


def _highest(values: Sequence[float]) -> Iterable[float]:
    return itertools.accumulate(values, max)


class _Alarm(Detector):
    """The monitor's own word, which an epoch without an alarm has too: None."""

    def has(self, record: Record) -> bool:
        return self.field in record


DETECTORS = {
    "PGD probe": Detector("probe_pgd", f"PGD-5's accuracy {100 * DROP:.0f} points below its best", _fell(DROP)),
    "gap": Detector("gap", f"training attack's accuracy {100 * GAP:.0f} points above PGD-5's", _above(GAP)),
    "alignment": Detector("alignment", "cosine of gradients at x and x + U(eps): half of its highest", _halved),
    "abnormal share": Detector("abnormal", f"{100 * ABNORMAL:.0f} % with more loss at x + U(eps)", _above(ABNORMAL)),
    "SORA's cosine": Detector("cosine", "cosine of gradients before and after: half of its highest", _halved),
    "the monitor's alarm": _Alarm("alarm", "probe and gap together", lambda values: map(bool, values)),
}


@dataclass(frozen=True)
class Course:
    """How a run went.

    Attributes:
        result: of the run.
        collapse: the epoch at which it collapsed, from 0; None where it did not.
        seen: {detector: the epoch at which it fired first, or None}; detectors without readings are not in it.
    """

    result: Result
    collapse: int | None
    seen: dict[str, int | None]


@dataclass(frozen=True)
class Score:
    """How well a detector did.

    Attributes:
        name: of the detector.
        rule: in words.
        found: the runs that collapsed and in which it fired.
        collapsed: the runs that collapsed.
        leads: of each run in `found`, the epochs from the firing to the collapse; below 0 it was late.
        false: the runs that did not collapse and in which it fired.
        sound: the runs that did not collapse.
    """

    name: str
    rule: str
    found: int
    collapsed: int
    leads: tuple[int, ...]
    false: int
    sound: int

    @property
    def lead(self) -> float | None:
        """The median of `leads`; None where there are none."""
        return median(self.leads) if self.leads else None


def courses(results: Iterable[Result]) -> list[Course]:
    """The courses of all runs with a training attack whose records tell whether they collapsed."""
    results = list(results)
    with_pgd = {(row_of(each), each.cell.seed): each for each in results if each.cell.attack == PGD}
    found = []
    for each in results:
        partner = with_pgd.get((row_of(each), each.cell.seed)) if each.cell.attack != PGD else None
        if each.attack != "none" and any(map(_judged, each.epochs)):
            seen = {
                name: detector.first(each.epochs)
                for name, detector in DETECTORS.items()
                if any(map(detector.has, each.epochs))
            }
            found.append(Course(each, collapse(each.epochs, _measure(partner)), seen))
    return found


def _measure(partner: Result | None) -> Sequence[Record] | None:
    """The epochs of the run with PGD, which tell how robust a run could be; none of a model that says one class."""
    if partner is None:
        return None
    return [] if partner.constant else partner.epochs


def collapse(epochs: Sequence[Record], partner: Sequence[Record] | None = None) -> int | None:
    """The epoch, from 0, at which a run collapsed, by DEFINITION; None where it did not.

    Args:
        epochs: its records; those without a validation or a probe do not count.
        partner: the records of the run trained with PGD from the same seed.
    """
    of_partner = {each["epoch"]: each.get("robust_accuracy") for each in partner or ()}
    best = 0.0
    for each in filter(_judged, epochs):
        robust = each["robust_accuracy"]
        best = max(best, robust)
        reference = of_partner.get(each["epoch"])
        if partner is None:
            reference = each["probe_attack"]
        could_be = max(best, reference or 0.0)
        fell = robust < HALF * could_be and could_be - robust > LEAST
        if fell and each["probe_pgd"] < HALF * each["probe_attack"]:
            epoch: int = each["epoch"]
            return epoch
    return None


def scores(found: Iterable[Course]) -> list[Score]:
    """The score of each detector that had something to see."""
    found, rows = list(found), []
    for name, detector in DETECTORS.items():
        seen = [(each.collapse, each.seen[name]) for each in found if name in each.seen]
        if seen:
            collapsed = [(when, fired) for when, fired in seen if when is not None]
            sound = [fired for when, fired in seen if when is None]
            leads = tuple(when - fired for when, fired in collapsed if fired is not None)
            false = sum(fired is not None for fired in sound)
            rows.append(Score(name, detector.rule, len(leads), len(collapsed), leads, false, len(sound)))
    return rows


def _judged(record: Record) -> bool:
    return all(record.get(name) is not None for name in ("robust_accuracy", "probe_attack", "probe_pgd"))
