"""Catastrophic overfitting in the records of training: which runs collapsed, when, and which detectors saw it."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from fastadv.study.files import Record
from fastadv.study.partners import pgd_of
from fastadv.study.results import HEADLINE_JUDGE, LEAST, Result, grouped, judge_words, row_of

HALF = 0.5
PARTLY = 0.10
DROP, GAP, ABNORMAL = 0.20, 0.20, 0.10

DEFINITION = (
    "A run has collapsed at the first epoch at which its accuracy under PGD-10 on the validation images is less than "
    f"half of what it could be, and more than {100 * LEAST:.0f} points below it, while of the monitor's images fewer "
    "than half as many, and fewer by more than "
    f"{100 * PARTLY:.0f} points, are classified correctly under PGD-5 as under the attack trained with (for stored "
    "signs under FGSM, which they imitate). What it could be is its "
    "best so far or, if higher, at the same epoch that of the run trained with PGD from the same seed; where there is "
    "no such run, the accuracy under the attack trained with. Where the run with PGD ends with one class for all "
    f"images, or {judge_words(HEADLINE_JUDGE)} leaves it less than {100 * LEAST:.0f} % of the test images, there is "
    "little to lose and a collapse would not show: such a run counts only if it fell from its own best. So does a run "
    "without one with PGD whose own model ends like that, or with no more than a guess is right for. The second "
    "condition tells catastrophic overfitting from a model that forgets, or overfits as any does. A run that did not "
    "collapse has overfitted partly if at some epoch the accuracy under PGD-10 is more than "
    f"{100 * PARTLY:.0f} points below its best so far or that of the run trained with PGD, while the monitor's images "
    "are classified correctly under the attack trained with more often than under PGD-5, by more than "
    f"{100 * PARTLY:.0f} points. The weights that were chosen may be of an epoch before. A run that did neither is "
    f"weak if {judge_words(HEADLINE_JUDGE)} leaves its chosen weights less than half of what it leaves those of the "
    f"run trained with PGD, and more than {100 * LEAST:.0f} points less: it did not learn to be robust, or forgot it."
)

Rule = Callable[[Sequence[float]], Iterable[bool]]  # the values of a field over the epochs -> whether each one fires


@dataclass(frozen=True)
class Detector:
    """A rule that tells a collapse from the monitor's readings.

    Attributes:
        field: the name of the reading in an epoch's record; epochs without it do not count.
        rule: the rule in words.
        fires: the rule: for each value of the field, whether the detector fires there.
    """

    field: str
    rule: str
    fires: Rule

    def first(self, epochs: Sequence[Record]) -> int | None:
        """The first epoch at which the detector fires, from 0; None where it never does."""
        seen = [each for each in epochs if self.has(each)]
        fired = self.fires([each[self.field] for each in seen])
        return next((each["epoch"] for each, fires in zip(seen, fired, strict=True) if fires), None)

    def has(self, record: Record) -> bool:
        """Whether an epoch's record has the field."""
        return record.get(self.field) is not None


def _fell(by: float) -> Rule:
    return lambda values: (best - value > by for value, best in zip(values, _highest(values), strict=True))


def _halved(values: Sequence[float]) -> Iterable[bool]:
    return (0 < best and value < HALF * best for value, best in zip(values, _highest(values), strict=True))


def _above(threshold: float) -> Rule:
    return lambda values: (value > threshold for value in values)


def _highest(values: Sequence[float]) -> Iterable[float]:
    return itertools.accumulate(values, max)


class _Alarm(Detector):
    """The monitor's own alarm. Every epoch with a monitor has the field; it is None where there is no alarm."""

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
        result: the finished cell of the run.
        collapse: the epoch at which the run collapsed, from 0; None where it did not.
        partly: where it did not collapse, the epoch at which it had first overfitted partly; None where it never had.
        weak: whether it is weak beside the run with PGD, and neither collapsed nor overfitted partly.
        seen: {name of a detector: the epoch at which it fired first, or None}, of the detectors that have readings.
        shows: whether a collapse would show; not where the run with PGD from the same seed is not robust either, nor,
            where there is none, if the run itself is not.
        partner: the run with PGD from the same seed; None where there is none.
    """

    result: Result
    collapse: int | None
    partly: int | None
    weak: bool
    seen: dict[str, int | None]
    shows: bool = True
    partner: Result | None = None

    @property
    def beside_pgd(self) -> bool:
        """Whether there is a run with PGD from the same seed that is robust on more images than a guess."""
        return self.partner is not None and self.partner.above_chance

    @property
    def how(self) -> str | None:
        """How the run failed: "collapsed", "partly" or "weak"; None where it did not."""
        if self.collapse is not None:
            return "collapsed"
        return "partly" if self.partly is not None else "weak" if self.weak else None

    @property
    def sound(self) -> bool:
        """Whether the run did not fail, where that would show."""
        return self.shows and self.how is None


@dataclass(frozen=True)
class Score:
    """How well a detector told the collapsed runs from the others.

    Attributes:
        name: the name of the detector.
        rule: its rule in words.
        found: the number of collapsed runs in which it fired.
        collapsed: the number of collapsed runs.
        leads: for each run of `found`, the epochs from the firing to the collapse; -1 is one epoch too late.
        false: the number of sound runs in which it fired.
        sound: the number of sound runs, which did not fail in any way and could not hide it.
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
    """The courses of the runs that had a training attack and whose records tell whether they collapsed.

    A record tells it where an epoch has both a validation and the monitor's readings.
    """
    results = list(results)
    names = {row: pgd_of(group) for row, group in grouped(results, row_of)}
    with_pgd = {(row_of(each), each.cell.seed): each for each in results if each.cell.attack == names[row_of(each)]}
    found = []
    for each in results:
        partner = with_pgd.get((row_of(each), each.cell.seed))
        partner = None if partner is each else partner
        if each.attack != "none" and any(map(_judged, each.epochs)):
            seen = {
                name: detector.first(each.epochs)
                for name, detector in DETECTORS.items()
                if any(map(detector.has, each.epochs))
            }
            measure = _measure(partner)
            fallen, half = collapse(each.epochs, measure), partly(each.epochs, measure)
            robust = each.above_chance if partner is None else partner.robust
            shows = robust or fallen is not None or half is not None
            low = shows and fallen is None and half is None and partner is not None and weak(each, partner)
            found.append(Course(each, fallen, half if fallen is None else None, low, seen, shows, partner))
    return found


def _measure(partner: Result | None) -> Sequence[Record] | None:
    """The epochs of the run with PGD, which show how robust a run could be.

    None where there is no such run. An empty list where its model is not robust, or predicts one class for all images:
    it shows nothing.
    """
    if partner is None:
        return None
    return partner.epochs if partner.robust else []


def collapse(epochs: Sequence[Record], partner: Sequence[Record] | None = None) -> int | None:
    """The epoch at which a run collapsed, as DEFINITION says.

    Args:
        epochs: the records of the run's epochs; epochs without a validation or the monitor's readings do not count.
        partner: the records of the run that was trained with PGD from the same seed; None where there is no such run.

    Returns:
        The epoch, from 0; None where the run did not collapse.
    """
    for each, could_be in _with_what_could_be(epochs, partner):
        robust = each["robust_accuracy"]
        halved = each["probe_pgd"] < HALF * each["probe_attack"]
        if _fell_far(robust, could_be) and halved and each["probe_attack"] - each["probe_pgd"] > PARTLY:
            return int(each["epoch"])
    return None


def partly(epochs: Sequence[Record], partner: Sequence[Record] | None = None) -> int | None:
    """The first epoch at which a run had overfitted partly, as DEFINITION says; arguments and result as of collapse."""
    for each, could_be in _with_what_could_be(epochs, partner or ()):
        if could_be - each["robust_accuracy"] > PARTLY and each["probe_attack"] - each["probe_pgd"] > PARTLY:
            return int(each["epoch"])
    return None


def weak(run: Result, partner: Result) -> bool:
    """Whether a run is weak beside that with PGD, as DEFINITION says of those that did not overfit."""
    accuracy, could_be = (each.accuracies.get(HEADLINE_JUDGE, 0.0) for each in (run, partner))
    return _fell_far(accuracy, could_be)


def _fell_far(robust: float, could_be: float) -> bool:
    return robust < HALF * could_be and could_be - robust > LEAST


def _with_what_could_be(epochs: Sequence[Record], partner: Sequence[Record] | None) -> Iterator[tuple[Record, float]]:
    """Each epoch that was judged, with the accuracy under PGD-10 that the run could have had there."""
    of_partner = {each["epoch"]: each.get("robust_accuracy") for each in partner or ()}
    best = 0.0
    for each in filter(_judged, epochs):
        best = max(best, each["robust_accuracy"])
        reference = each["probe_attack"] if partner is None else of_partner.get(each["epoch"])
        yield each, max(best, reference or 0.0)


def failed(runs: Iterable[Course]) -> tuple[int, int, int, int]:
    """(Collapsed runs, those that overfitted partly, weak ones, all), of the runs in which it would show."""
    shown = [each.how for each in runs if each.shows]
    return shown.count("collapsed"), shown.count("partly"), shown.count("weak"), len(shown)


def scores(found: Iterable[Course]) -> list[Score]:
    """The score of each detector that has readings in at least one run."""
    found, rows = list(found), []
    for name, detector in DETECTORS.items():
        seen = [each for each in found if name in each.seen]
        if seen:
            collapsed = [(each.collapse, each.seen[name]) for each in seen if each.collapse is not None]
            sound = [each.seen[name] for each in seen if each.sound]
            leads = tuple(when - fired for when, fired in collapsed if fired is not None)
            false = sum(fired is not None for fired in sound)
            rows.append(Score(name, detector.rule, len(leads), len(collapsed), leads, false, len(sound)))
    return rows


def _judged(record: Record) -> bool:
    return all(record.get(name) is not None for name in ("robust_accuracy", "probe_attack", "probe_pgd"))
