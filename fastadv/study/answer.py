"""A study's answer to the question in its title, in sentences."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from fastadv.study import price_words
from fastadv.study.grid import SCRATCH
from fastadv.study.overfitting import PARTLY, Course, Score
from fastadv.study.paper_table import PAPER
from fastadv.study.price import Summary
from fastadv.study.results import (
    HEADLINE_JUDGE,
    JUDGE_ORDER,
    LEAST,
    PGD,
    attack_words,
    grouped,
    judge_words,
    method_words,
    set_words,
)
from fastadv.study.statistics import Average, Difference
from fastadv.study.timing import Time
from fastadv.study.words import counted, distinct, interval, listed, points

TITLE = "Are fast methods stable in adversarially robust transfer learning?"
NOT_MEASURED = "Not measured yet."
SHOWN = 6  # places in a list
FEW = 10  # collapses: with fewer, which detector saw one more of them is chance


@dataclass(frozen=True)
class Answer:
    """The answer to the question of the title.

    Attributes:
        kind: "open" (not measured), "stable", "mixed" or "unstable".
        headline: in a few words.
        sentences: the findings that support it.
    """

    kind: str
    headline: str
    sentences: tuple[str, ...]


def answer(
    courses: Iterable[Course],
    averages: Sequence[Average],
    times: Sequence[Time],
    scores: Iterable[Score],
    prices: Sequence[Summary] = (),
    complete: bool = True,
    differences: Sequence[Difference] = (),
    no_pgd: str = "no cell has a partner trained with PGD",
) -> Answer:
    """The answer from what was measured so far, which may be nothing.

    Args:
        courses: how the runs went.
        averages: the differences to PGD, averaged over data sets.
        times: the times of methods with attacks.
        scores: the scores of the detectors.
        prices: what training attacks cost and bring, over eps.
        complete: whether all cells are finished.
        differences: the differences to PGD on each data set.
        no_pgd: why there are no averages, if there are none.
    """
    courses = list(courses)
    kind, headline, stability = _stability(courses)
    if kind == "stable" and prices and not averages:  # robust beside what? A study of prices need not have PGD
        kind, headline = "open", "Not asked: there is no PGD to compare with."
    elif kind == "stable" and not any(each.beside_pgd for each in courses if each.shows and _fast_transfer(each)):
        kind, headline = "open", NOT_MEASURED
        stability.append(
            "Whether they are stable stays open: beside none of them is a run trained with PGD from the same seed that "
            f"is robust on more images than a guess is right for ({judge_words(HEADLINE_JUDGE)})."
        )
    headline = "So far, yes." if kind == "stable" and not complete else headline
    return Answer(
        kind,
        headline,
        (
            *stability,
            *_from_scratch([each for each in courses if each.result.fast and not each.result.transfer]),
            *(_to_pgd(averages, no_pgd) if averages or not prices else []),
            *_of_pairs(differences),
            *price_words.sentences(prices),
            *_time(times),
            *_warned(scores),
        ),
    )


def _stability(courses: Iterable[Course]) -> tuple[str, str, list[str]]:
    transfer = list(filter(_fast_transfer, courses))
    runs = [each for each in transfer if each.shows]
    kind, headline, words = _of_those_that_show(runs)
    return kind, headline, [*words, *_hidden(transfer)]


def _fast_transfer(each: Course) -> bool:
    return each.result.fast and each.result.transfer


def _hidden(runs: Iterable[Course]) -> list[str]:
    """How many runs are not counted, at which eps, and why: with a run with PGD beside them, and without one."""
    words = []
    judge = judge_words(HEADLINE_JUDGE)
    for alone, group in grouped((each for each in runs if not each.shows), lambda each: each.partner is None):
        counts = Counter(each.result.cell.eps for each in group)
        by_eps = listed(f"{count} at eps {eps:g}" for eps, count in sorted(counts.items()))
        where = f" ({by_eps})" if len(counts) > 1 else ""
        why = f"PGD's model is not robust there either ({judge} leaves it less than {100 * LEAST:.0f} %, or it "
        if alone:
            why = f"no run with PGD from the same seed is beside {'it' if len(group) == 1 else 'them'}, and "
            why += f"{'its' if len(group) == 1 else 'their'} own model is not robust ({judge} leaves it less than "
            why += f"{100 * LEAST:.0f} % or no more than a guess is right for, or it "
        runs_are = "run is" if len(group) == 1 else "runs are"
        words.append(f"{len(group)} more {runs_are} not counted{where}: {why}predicts one class).")
    return words


def _of_those_that_show(runs: Sequence[Course]) -> tuple[str, str, list[str]]:
    collapsed, partly, weak = ([e for e in runs if e.how == how] for how in ("collapsed", "partly", "weak"))
    if not runs:
        unknown = "No finished cell is a fine-tuning with a fast attack whose records show whether it collapsed."
        return "open", NOT_MEASURED, [unknown]
    counts = Counter(attack_words(each.result.cell.attack) for each in runs)
    one, ranges = len(runs) == 1, _ranges(runs)
    where = f"of transfer learning with {next(iter(counts))} ({ranges})"
    if len(counts) > 1:
        shares = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        where = f"of transfer learning with fast attacks ({shares}; {ranges})"
    none = f"The one run {where} did not" if one else f"None of the {len(runs)} runs {where}"
    none += " overfit catastrophically." if one else " overfitted catastrophically."
    if not collapsed and not partly and not weak:
        rate = 100 * (1 - 0.05 ** (1 / len(runs)))
        more = f"Were they independent, up to {rate:.2g} % of such runs could collapse (bound at 95 % confidence)."
        return "stable", "Yes, as far as this study goes.", [none, more]
    fallen = "The one run" if one else f"{len(collapsed)} of the {len(runs)} runs"
    words = [f"{fallen} {where} overfitted catastrophically: {_places(collapsed, runs)}." if collapsed else none]
    words += _by_eps(collapsed, runs)
    if partly:
        other = " other" if collapsed else ""
        count = f"{len(partly)}{other} {'run' if len(partly) == 1 else 'runs'}"
        words.append(f"{count} overfitted partly, losing more than {100 * PARTLY:.0f} points: {_places(partly, runs)}.")
    if weak:
        judge, of = judge_words(HEADLINE_JUDGE), counted(len(weak), "run")
        words.append(
            f"In {of} without overfitting {judge} leaves less than half of PGD's accuracy: {_places(weak, runs)}."
        )
    if len(collapsed) + len(weak) == len(runs):
        return "unstable", "No.", words
    return "mixed", _headline(collapsed, runs), words


def _headline(collapsed: Sequence[Course], runs: Sequence[Course]) -> str:
    """Up to which eps no run collapsed, and how many did above it."""
    eps = sorted({each.result.cell.eps for each in runs})
    first = min((each.result.cell.eps for each in collapsed), default=None)
    if first is None or first == eps[0]:
        return "Not everywhere."
    above = [each for each in runs if each.result.cell.eps >= first]
    below = f"Up to eps {eps[eps.index(first) - 1]:g} none of {counted(len(runs) - len(above), 'run')} collapsed."
    where = f"At eps {first:g}" if first == eps[-1] else f"From eps {first:g} on"
    return f"{below} {where} {len(collapsed)} of {len(above)} did."


def _by_eps(collapsed: Sequence[Course], runs: Sequence[Course]) -> list[str]:
    """How many runs collapsed at the eps where some did, and at the others; and what was not run at the first."""
    budgets = sorted({each.result.cell.eps for each in collapsed})
    at = [each for each in runs if each.result.cell.eps in budgets]
    if not budgets or len(at) == len(runs):
        return []
    eps = listed(f"{each:g}" for each in budgets)
    words = [f"At eps {eps} that is {len(collapsed)} of {len(at)}, at every other eps 0 of {len(runs) - len(at)}."]
    absent = [words for words in _kinds(runs) if words not in _kinds(at)]
    if absent:
        names = listed(absent)
        words.append(f"{names[0].upper()}{names[1:]} {'was' if len(absent) == 1 else 'were'} not run at eps {eps}.")
    return words


def _kinds(runs: Sequence[Course]) -> list[str]:
    """The attacks and methods of the runs."""
    attacks = (attack_words(each.result.cell.attack) for each in runs)
    return distinct([*attacks, *map(method_words, _methods(runs))])


def _places(some: Sequence[Course], runs: Sequence[Course]) -> str:
    """Where some of the runs are, the highest rate first: "full fine-tuning with FGSM at eps 16 (2 of 3: eurosat)"."""
    all_runs, fallen = Counter(map(_place, runs)), dict(grouped(some, _place))
    order = sorted(fallen, key=lambda place: (-len(fallen[place]) / all_runs[place], place))
    words = []
    for method, attack, eps in order[:SHOWN]:
        here = fallen[method, attack, eps]
        sets = listed(distinct(set_words(each.result.cell) for each in here))
        count = f"{len(here)} of {all_runs[method, attack, eps]}"
        words.append(f"{method} with {attack} at eps {eps:g} ({count}: {sets})")
    rest = sum(len(fallen[place]) for place in order[SHOWN:])
    return ", ".join(words) + (f", and {rest} more" if rest else "")


def _place(each: Course) -> tuple[str, str, float]:
    cell = each.result.cell
    return method_words(cell.method), attack_words(cell.attack), cell.eps


def _ranges(runs: Sequence[Course]) -> str:
    sets = len({(each.result.cell.data, each.result.cell.classes) for each in runs})
    eps = listed(f"{e:g}" for e in sorted({each.result.cell.eps for each in runs}))
    return f"{counted(sets, 'data set')}; {listed(map(method_words, _methods(runs)))}; eps {eps}"


def _from_scratch(found: Sequence[Course]) -> list[str]:
    runs, start = [each for each in found if each.shows], "From scratch, for comparison, "
    hidden = [start + words for words in _hidden(found)]
    if not runs:
        return hidden
    collapsed = [each for each in runs if each.collapse is not None]
    if not collapsed:
        highest = max(each.result.cell.eps for each in runs)
        return [f"{start}none of {counted(len(runs), 'run')} did: not seen up to eps {highest:g}.", *hidden]
    where = listed(f"{eps:g}" for eps in sorted({each.result.cell.eps for each in collapsed}))
    return [f"{start}{len(collapsed)} of {counted(len(runs), 'run')} did, at eps {where}.", *hidden]


def _to_pgd(averages: Sequence[Average], no_pgd: str) -> list[str]:
    """The difference to PGD in words, of each model at each eps."""
    models = distinct(each.model for each in averages)
    found = [_of_model([each for each in averages if each.model == model], len(models) > 1) for model in models]
    words = [said for said in found if said]
    why = "only models trained from scratch have a partner trained with PGD" if averages else no_pgd
    return words or [f"What it costs in accuracy is not measured yet: {why}."]


def _of_model(averages: Sequence[Average], several: bool) -> str:
    found = headlines(averages)
    if not found:
        return ""
    one, models = found[0], f"{found[0].model} models" if several else "models"
    words = [f"{of}: {'; '.join(map(_difference, group))}" for of, group in grouped(found, _of)]
    return (
        f"Robust accuracy of {models} trained with {attack_words(one.attack)} minus that of {models} trained with PGD, "
        f"judged by {judge_words(one.judge)}, with 95 % intervals. In {'. In '.join(words)}."
    )


def _of_pairs(differences: Iterable[Difference]) -> list[str]:
    """What the means hide: in how many pairs of a data set and a method the first fast attack loses or gains to PGD.

    Args:
        differences: the differences to PGD on each data set.
    """
    judged = [each for each in differences if each.judge == HEADLINE_JUDGE and each.row.method != SCRATCH]
    attack = "fgsm" if any(each.attack == "fgsm" for each in judged) else next((each.attack for each in judged), "")
    by_eps = sorted(grouped((e for e in judged if e.attack == attack), lambda each: each.row.eps))
    if len(judged) < 2:
        return []
    below = listed(f"{sum(e.high < 0 for e in pairs)} of {len(pairs)} at eps {eps:g}" for eps, pairs in by_eps)
    above = listed(str(sum(e.low > 0 for e in pairs)) for _, pairs in by_eps)
    words = [
        f"Of the pairs of a data set and a method, models trained with {attack_words(attack)} are below PGD's by more "
        f"than the pair's own 95 % interval in {below}, and above them in {above}."
    ]
    hidden = [(eps, [e.mean for e in pairs if e.robust]) for eps, pairs in by_eps if not all(e.robust for e in pairs)]
    if any(means for _, means in hidden):
        means = listed(f"{points(mean(m))} at eps {eps:g} ({counted(len(m), 'pair')})" for eps, m in hidden if m)
        words.append(f"Where PGD's model is robust the mean difference is {means}.")
    return [" ".join(words)]


def _of(each: Average) -> str:
    names = listed(map(method_words, each.methods))
    methods = names if len(each.methods) == 1 else f"the mean of {names}"
    return f"{methods}, {counted(each.data_sets, 'data set')}"


def _difference(each: Average) -> str:
    remarks = [] if each.low > 0 or each.high < 0 else ["could be chance"]
    remarks += [f"the paper: {points(PAPER[each.eps])}"] if each.eps in PAPER else []
    said = interval(each.mean, each.low, each.high, " points").removesuffix(")")
    return "; ".join([f"eps {each.eps:g}: {said}", *remarks]) + ")"


def _time(times: Sequence[Time]) -> list[str]:
    attack = _first_fast(times)
    found = [each for each in times if each.attack == attack and each.to_pgd is not None and each.method != SCRATCH]
    if attack is None or not found:
        return []
    several = len({each.model for each in found}) > 1
    of = [method_words(each.method) + (f" of {each.model}" if several else "") for each in found]
    words = listed(f"{each.to_pgd:.2f} ({name})" for each, name in zip(found, of, strict=True))
    return [f"Training with {attack_words(attack)} takes, as a part of PGD's time: {words}."]


def _warned(scores: Iterable[Score]) -> list[str]:
    found = [each for each in scores if each.lead is not None]
    if not found:
        return []
    most = max(each.found for each in found)
    best = sorted((each for each in found if each.found == most), key=lambda each: (-(each.lead or 0), each.false))
    names = listed(
        f"“{each.name}” ({_when(each.lead or 0)}; false alarms in {each.false} of {counted(each.sound, 'sound run')})"
        for each in best
    )
    few = " (too few to rank detectors by)" if best[0].collapsed < FEW else ""
    subject = "The detector that saw most collapses" if len(best) == 1 else "The detectors that saw most collapses"
    verb = "is" if len(best) == 1 else "are"
    return [f"{subject}, {most} of {best[0].collapsed}{few}, {verb} {names}."]


def _when(lead: float) -> str:
    if not lead:
        return "in the median in the epoch of the collapse"
    return f"in the median {counted(abs(lead), 'epoch')} {'before' if lead > 0 else 'after'} the collapse"


# ---------------------------------------------------------------------- words


def headlines(averages: Sequence[Average]) -> list[Average]:
    """One model's averages on the first screen, one for each eps: of the first fast attack, over the most methods."""
    judged = [each for each in averages if each.judge == HEADLINE_JUDGE and each.methods != (SCRATCH,)]
    if not judged:
        return []
    attack = "fgsm" if any(each.attack == "fgsm" for each in judged) else judged[0].attack
    best: dict[float, Average] = {}
    for each in judged:
        if each.attack == attack:
            other = best.get(each.eps)
            best[each.eps] = each if other is None or len(each.methods) > len(other.methods) else other
    return [best[eps] for eps in sorted(best)]


def judges_of(found: Iterable[str]) -> list[str]:
    """The judges, each once, weak ones first."""
    known = {judge: place for place, judge in enumerate(JUDGE_ORDER)}
    return sorted(distinct(found), key=lambda judge: known.get(judge, len(known)))


def _first_fast(times: Sequence[Time]) -> str | None:
    attacks = [each.attack for each in times if each.attack not in ("none", PGD)]
    return "fgsm" if "fgsm" in attacks else next(iter(attacks), None)


def _methods(runs: Sequence[Course]) -> list[str]:
    return distinct(each.result.cell.method for each in runs)
