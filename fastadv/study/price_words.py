"""The prices of training attacks in sentences, and as a table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from fastadv.study.price import JUDGE, Price, Summary, summaries
from fastadv.study.results import grouped, judge_words, method_words
from fastadv.study.words import listed, markdown, points

LITTLE = 0.01  # the loss of accuracy that an attack cheaper than FGSM may have
SAME_TIME = 1.05  # times FGSM's: what takes up to so long counts as no slower


def sentences(prices: Sequence[Price]) -> list[str]:
    """For each method: the cheapest attack that loses little to FGSM on each data set, and the best in FGSM's time."""
    words = []
    for method, found in grouped(summaries(prices), lambda each: each.row.method):
        of_fgsm = [each for each in found if each.attack == each.against]
        # Means over fewer data sets or eps than FGSM has would not be compared with its own.
        attacks = [
            _Compared(attack, group)
            for attack, group in grouped(found, lambda each: each.attack)
            if all(each.to_fgsm for each in group) and _measured(group) == _measured(of_fgsm, group[0].against)
        ]
        if not attacks:
            continue
        fgsm = median(each.time for each in of_fgsm)
        near = [each for each in attacks if min(each.points) >= -LITTLE and each.time < fgsm]
        in_time = [each for each in attacks if each.time <= SAME_TIME * fgsm]
        about = f"For {method_words(method)}, where FGSM takes {fgsm:.2f} times as long as training without an attack,"
        within = f"within {100 * LITTLE:g} point of its accuracy under {judge_words(JUDGE)}"
        if near:
            words.append(f"{about} {min(near, key=lambda each: each.time)} is the cheapest attack {within}.")
        else:
            words.append(f"{about} no cheaper attack comes {within}.")
        if in_time:
            words.append(f"The best in FGSM's time is {max(in_time, key=lambda each: mean(each.points))}.")
    return words


@dataclass(frozen=True)
class _Compared:
    """An attack that is compared with FGSM on each data set."""

    attack: str
    summaries: Sequence[Summary]

    @property
    def points(self) -> list[float]:
        return [each.to_fgsm[0] for each in self.summaries if each.to_fgsm]

    @property
    def time(self) -> float:
        return median(each.time for each in self.summaries)

    def __str__(self) -> str:
        found = zip(self.points, self.summaries, strict=True)
        of = listed(f"{points(value)} on {each.row.data}" for value, each in found)
        return f"{self.attack} ({of}; {self.time:.2f} times)"


def rows(prices: Sequence[Price]) -> tuple[list[str], list[list[str]]]:
    """A table of the means over eps on each data set: (its head, a row for each method and attack).

    Args:
        prices: what training attacks cost and bring.
    """
    found = summaries(prices)
    sets = list(dict.fromkeys(map(_images, found)))
    several = len({model for _, _, model in sets}) > 1
    head = ["method", "attack", "time / standard"]
    for data, classes, model in sets:
        name = " ".join(filter(None, (data, classes, model if several else None)))
        head += [f"{name}: clean", judge_words(JUDGE), "minus FGSM's"]
    body = []
    for (method, attack), group in grouped(found, lambda each: (each.row.method, each.attack)):
        of = {_images(each): each for each in group}
        cells = [cell for each in sets for cell in (_cells_of(of[each]) if each in of else [""] * 3)]
        fewer = len({each.budgets for each in found if each.row.method == method}) > 1
        only = f" (eps {listed(f'{eps:g}' for eps in group[0].budgets)})" if fewer else ""
        body.append([method_words(method), attack + only, f"{median(each.time for each in group):.2f}", *cells])
    return head, body


def table(prices: Sequence[Price]) -> str:
    """The table of `rows` in Markdown."""
    return markdown(*rows(prices), left=2)


def _measured(summaries: Iterable[Summary], attack: str | None = None) -> set[tuple[object, ...]]:
    """The data sets and eps for which an attack is measured."""
    return {(*_images(each), each.budgets) for each in summaries if attack in (None, each.attack)}


def _images(each: Summary) -> tuple[str, str | None, str]:
    return each.row.data, each.row.classes, each.row.model


def _cells_of(each: Summary) -> list[str]:
    difference = "" if each.to_fgsm is None else "{} ({} to {})".format(*map(points, each.to_fgsm))
    return [f"{100 * each.clean:.1f} %", f"{100 * each.robust:.1f} %", difference]
