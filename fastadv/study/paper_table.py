"""The table for README: what FGSM's models lack in robust accuracy beside PGD's, in the paper and in a study."""

from collections.abc import Mapping, Sequence

from fastadv.study.grid import SCRATCH
from fastadv.study.results import HEADLINE_JUDGE, judge_words, method_place, method_words
from fastadv.study.statistics import Average, Difference, average, cut
from fastadv.study.timing import Time
from fastadv.study.words import counted, interval, listed, points

JUDGES = ("pgd-10", "pma", "apgd", "autoattack")
PAPER: dict[float, float] = {4: -0.0039, 8: -0.0139}  # eps in 1/255: accuracy with FGSM minus accuracy with PGD
PAPER_TIME = 1 / 4
ROWS = 10
PAPER_SETUP = (
    "The paper (“Are Fast Methods Stable in Adversarially Robust Transfer Learning?”, 2025) has -0.39 and -1.39 points "
    "at eps 4 and 8 for a quarter of the time, on average: robust ImageNet backbones at 224 pixels, judged by PGD-10, "
    "which flatters. Backbones, image sizes and data sets differ from those of this study."
)

Key = tuple[str, float, tuple[str, ...]]  # model, eps, methods
Groups = Mapping[Key, Mapping[str, Average]]  # {key: {judge: the difference}}


def table(
    averages: Sequence[Average], times: Sequence[Time], differences: Sequence[Difference] = ()
) -> tuple[list[str], list[list[str]]]:
    """The table: (its head, its rows).

    It has at most ten rows: the paper's numbers, and from the paper's lowest eps on the mean over our methods, and each
    method that a judge judged and not all the others; then each method at eps 8, what has a lower eps, and what fewer
    data sets have, as far as there is room.

    Args:
        averages: the differences to PGD, averaged over data sets.
        times: the times of methods with attacks.
        differences: those of each data set, from which the headline judge's is taken where another has fewer.
    """
    groups: dict[Key, dict[str, Average]] = {}
    for each in averages:
        if each.attack == "fgsm" and each.methods != (SCRATCH,):
            groups.setdefault((each.model, each.eps, each.methods), {})[each.judge] = each
    judges = [judge for judge in JUDGES if any(each.judge == judge for each in averages)] or ["pgd-10", "pma"]
    rows = [
        _row("the paper, ImageNet backbones at 224 px", eps, "", _of_paper(mean, judges), PAPER_TIME)
        for eps, mean in PAPER.items()
    ]
    several, all_sets = len({key[0] for key in groups}) > 1, max(map(_sets, groups.values()), default=0)
    for key in _chosen(groups):
        (model, eps, methods), judged = key, groups[key]
        what = _named(methods) + (f", {model}" if several else "")
        what += f", {_sets(judged)} of {counted(all_sets, 'data set')}" if _sets(judged) < all_sets else ""
        what += _seeds(judged)
        reference = f"{100 * judged[HEADLINE_JUDGE].reference:.1f} %" if HEADLINE_JUDGE in judged else ""
        cells = [_cell(judged[judge], judged, differences) if judge in judged else "" for judge in judges]
        rows.append(_row(what, eps, reference, cells, _time(model, methods, times)))
    head = ["FGSM's robust accuracy minus PGD's", "eps", f"PGD's under {judge_words(HEADLINE_JUDGE)}"]
    return [*head, *map(judge_words, judges), "training time / PGD's"], rows


def _chosen(groups: Groups) -> list[Key]:
    """The keys of the rows that there is room for, in the order of the table."""
    most = {key[:2]: max((k for k in groups if k[:2] == key[:2]), key=lambda k: len(k[2])) for key in groups}
    means = list(most.values())
    alone = [key for key in groups if len(key[2]) == 1 and key not in means]
    judged = {key[2] for key in alone if groups[key].keys() - groups[most[key[:2]]].keys()}
    methods = [key for key in alone if key[1] == 8 or key[2] in judged]
    methods.sort(key=lambda key: (method_place(key[2][0]), key[1]))
    rows = [*sorted(means, key=lambda key: key[:2]), *methods]
    all_sets = max(map(_sets, groups.values()), default=0)

    def rank(key: Key) -> tuple[bool, ...]:
        return _sets(groups[key]) < all_sets, key[1] < min(PAPER), key not in means, key[2] not in judged

    chosen = sorted(rows, key=rank)[: ROWS - len(PAPER)]
    return [key for key in rows if key in chosen]


def _sets(judged: Mapping[str, Average]) -> int:
    return max(each.data_sets for each in judged.values())


def _time(model: str, methods: Sequence[str], times: Sequence[Time]) -> float | None:
    """The mean of the methods' measured time ratios; None where one is not measured."""
    of_fgsm = [each for each in times if (each.model, each.attack) == (model, "fgsm") and each.method in methods]
    ratios = [each.to_pgd for each in of_fgsm if each.to_pgd]
    return sum(ratios) / len(ratios) if len(ratios) == len(methods) else None


def _of_paper(mean: float, judges: Sequence[str]) -> list[str]:
    return [points(mean) if judge == "pgd-10" else "" for judge in judges]


def _row(what: str, eps: float, reference: str, cells: Sequence[str], time: float | None) -> list[str]:
    return [what, f"{eps:g}", reference, *cells, "" if time is None else f"{time:.2f}"]


def _seeds(judged: Mapping[str, Average]) -> str:
    """The seeds of a row, where they are not three or more everywhere."""
    most = max(judged.values(), key=lambda each: (each.seeds, each.data_sets))
    if most.least_seeds == most.seeds:
        return f", {counted(most.seeds, 'seed')}" if most.seeds < 3 else ""
    return f", {most.least_seeds} to {most.seeds} seeds"


def _cell(each: Average, judged: Mapping[str, Average], differences: Sequence[Difference]) -> str:
    """A difference; where it has fewer data sets or seeds than others of its row, also the headline judge's there."""
    seeds = max(other.seeds for other in judged.values())
    fewer = [counted(each.data_sets, "data set")] if each.data_sets < _sets(judged) else []
    fewer += [counted(each.seeds, "seed")] if each.seeds < seeds else []
    said = interval(each.mean, each.low, each.high)
    if not fewer:
        return said
    headline = _headline_there(each, differences)
    there = f" ({judge_words(HEADLINE_JUDGE)} of these: {points(headline)})" if headline is not None else ""
    return f"{said}, {', '.join(fewer)}{there}"


def _headline_there(of: Average, differences: Sequence[Difference]) -> float | None:
    """The mean difference under the headline judge, of the data sets and seeds that the average `of` has."""
    mine = [e for e in differences if (e.row.model, e.row.eps, e.attack) == (of.model, of.eps, of.attack)]
    places = {(e.row, seed) for e in mine if e.judge == of.judge for seed in e.seeds}
    there = [cut(e, [s for s in e.seeds if (e.row, s) in places]) for e in mine if e.judge == HEADLINE_JUDGE]
    found = average([e for e in there if e is not None], of.methods)
    return None if found is None else found.mean


def _named(methods: Sequence[str]) -> str:
    return method_words(methods[0]) if len(methods) == 1 else f"mean of {listed(methods)}"
