"""The table of fast training attacks: what each loses to PGD, how often it fails, and its time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastadv.study.grid import SCRATCH
from fastadv.study.overfitting import Course, failed
from fastadv.study.results import HEADLINE_JUDGE, Result, attack_words, grouped, judge_words
from fastadv.study.statistics import Difference, average, cut
from fastadv.study.timing import Time
from fastadv.study.words import interval

Place = tuple[str, str | None, int]  # data set, classes, seed


@dataclass(frozen=True)
class Table:
    """The fast attacks of one model and method side by side.

    For an eps the attacks are compared on the same data sets with the same seeds: those that all of them have that have
    the most data sets. An attack that has fewer is left out there.

    Attributes:
        model: the model with the method that was trained with the most attacks.
        method: that method.
        head: the names of the columns.
        rows: a row for each attack.
    """

    model: str
    method: str
    head: list[str]
    rows: list[list[str]]


def table(
    results: Iterable[Result], differences: Iterable[Difference], times: Iterable[Time], courses: Iterable[Course]
) -> Table | None:
    """The table; None where no method has two fast attacks that are compared with PGD.

    Args:
        results: the finished cells.
        differences: the differences to PGD.
        times: the times of methods with attacks.
        courses: how the runs went.
    """
    fast = {each.cell.attack for each in results if each.fast}
    judged = [each for each in differences if each.judge == HEADLINE_JUDGE and each.attack in fast]
    by_method = {
        key: group
        for key, group in grouped(judged, lambda each: (each.row.model, each.row.method))
        if key[1] != SCRATCH and len({each.attack for each in group}) > 1
    }
    if not by_method:
        return None
    model, method = max(by_method, key=lambda key: (len({e.attack for e in by_method[key]}), key[1] == "full"))
    mine = [each for each in courses if (each.result.cell.model, each.result.cell.method) == (model, method)]
    columns = {}
    for eps, group in sorted(grouped(by_method[model, method], lambda each: each.row.eps)):
        if len({each.attack for each in group}) > 1:
            columns[eps] = _column(group, [each for each in mine if each.result.cell.eps == eps])
    if not columns:
        return None
    attacks = list(dict.fromkeys(attack for column in columns.values() for attack in column))
    time = {each.attack: each for each in times if (each.model, each.method) == (model, method)}
    measured = all(time[attack].to_pgd is not None for attack in attacks)
    ratios = {attack: time[attack].to_pgd if measured else time[attack].predicted_to_pgd for attack in attacks}
    head = ["training attack", "time / PGD's" + ("" if measured else ", by the cost model")]
    for eps in columns:
        head += [f"eps {eps:g}: minus PGD's under {judge_words(HEADLINE_JUDGE)}", "failed"]
    rows = []
    for attack in sorted(attacks, key=lambda name: (ratios[name] or 0.0, attacks.index(name))):
        ratio = ratios[attack]
        cells = [cell for column in columns.values() for cell in column.get(attack, ("", ""))]
        rows.append([attack_words(attack), "" if ratio is None else f"{ratio:.2f}", *cells])
    return Table(model, method, head, rows)


def _column(differences: Sequence[Difference], courses: Sequence[Course]) -> dict[str, tuple[str, str]]:
    """{attack: (its difference to PGD, how many of its runs failed)} on what the attacks have in common."""
    places = {attack: _places(group) for attack, group in grouped(differences, lambda each: each.attack)}
    sets = {attack: {place[:2] for place in found} for attack, found in places.items()}
    most = max(map(len, sets.values()))
    widest = [attack for attack in places if len(sets[attack]) == most]
    common = set.intersection(*(places[attack] for attack in widest))
    found = {}
    for attack in widest:
        mine = [each for each in differences if each.attack == attack]
        there = [cut(e, [s for s in e.seeds if (e.row.data, e.row.classes, s) in common]) for e in mine]
        mean = average([each for each in there if each is not None], [differences[0].row.method])
        runs = [each for each in courses if each.result.cell.attack == attack and _place(each.result) in common]
        if mean is not None:
            found[attack] = interval(mean.mean, mean.low, mean.high), _failed(runs)
    return found


def _places(differences: Iterable[Difference]) -> set[Place]:
    return {(each.row.data, each.row.classes, seed) for each in differences for seed in each.seeds}


def _place(result: Result) -> Place:
    return result.cell.data, result.cell.classes, result.cell.seed


def _failed(runs: Sequence[Course]) -> str:
    """How many runs failed, of those where it would show: "2 of 6", "1, partly 1, weak 1 of 6"; "" where in none."""
    collapsed, partly, weak, shown = failed(runs)
    more = "".join(f", {how} {count}" for how, count in (("partly", partly), ("weak", weak)) if count)
    return f"{collapsed}{more} of {shown}" if shown else ""
