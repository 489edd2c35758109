"""The prices of training attacks in sentences, and as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from fastadv.study.price import Summary
from fastadv.study.results import HEADLINE_JUDGE, grouped, judge_words, method_words, set_words
from fastadv.study.words import counted, interval, listed, markdown, points

LITTLE = 0.01  # the loss of accuracy that an attack cheaper than FGSM may have
SAME_TIME = 1.05  # the ratio of two times up to which they count as the same


def sentences(found: Sequence[Summary]) -> list[str]:
    """For each method and FGSM: the cheapest attack that loses little to it, and the best one that takes no longer."""
    models = len({each.row.model for each in found})
    words = []
    for (model, method, standard, against), group in grouped(
        found, lambda each: (each.row.model, each.row.method, each.standard, each.against)
    ):
        rivals = _Rivals(group)
        if not rivals.reference or len(rivals.attacks) == 1:
            continue
        about = f"{method_words(method)}{f' of {model}' if models > 1 else ''}{rivals.settings()}"
        time = f"{rivals.times(rivals.reference)} as long as training without an attack ({standard})"
        words.append(
            f"{about[0].upper()}{about[1:]}: {against} takes {time}{'' if rivals.measured else ' by the cost model'}, "
            f"and {judge_words(HEADLINE_JUDGE)} leaves "
            + listed(f"{100 * each.robust:.1f} % on {rivals.place(each)}" for each in rivals.reference)
            + f". {rivals.answer()} {rivals.caution()}".rstrip()
        )
        if rivals.left_out:
            left_out = listed(rivals.left_out)
            words[-1] += f" Not measured everywhere and with as many seeds, and not compared: {left_out}."
    return words


@dataclass(frozen=True)
class _Rivals:
    """The attacks that are compared with one FGSM on each data set, for each eps."""

    summaries: Sequence[Summary]

    @property
    def reference(self) -> list[Summary]:
        return [each for each in self.summaries if each.attack == each.against]

    @property
    def measured(self) -> bool:
        """Whether measured times are compared, which FGSM and another attack have; else the cost model's are."""
        with_times = [
            attack for attack, group in self._compared.items() if all(each.time is not None for each in group)
        ]
        return len(with_times) > 1 and self.reference[0].attack in with_times

    @property
    def attacks(self) -> dict[str, list[Summary]]:
        """The attacks that are compared with FGSM, and FGSM: of measured times those that have them everywhere."""
        found, measured = self._compared, self.measured
        return {a: group for a, group in found.items() if all(each.time is not None or not measured for each in group)}

    @property
    def _compared(self) -> dict[str, list[Summary]]:
        """The attacks that are judged wherever FGSM is and with no fewer seeds, and FGSM."""
        runs = {(each.row, each.budgets): each.runs for each in self.reference}
        return {
            attack: group
            for attack, group in grouped(self.summaries, lambda each: each.attack)
            if {(each.row, each.budgets) for each in group} == runs.keys()
            and all(each.runs >= runs[each.row, each.budgets] for each in group)
            and all(each.to_fgsm or each.attack == each.against for each in group)
        }

    @property
    def left_out(self) -> list[str]:
        names = dict.fromkeys(each.attack for each in self.summaries if each.attack != each.standard)
        return [name for name in names if name not in self.attacks]

    def settings(self) -> str:
        """The eps, where it is not in `place`, and the number of seeds of FGSM: " at eps 4 and 8, 3 seeds"."""
        eps = "" if self._eps_differ else f" at eps {_eps(self.reference[0])}"
        seeds = [each.runs / len(each.budgets) for each in self.reference]
        least, most = math.floor(min(seeds)), math.ceil(max(seeds))
        return f"{eps}, {counted(most, 'seed') if least == most else f'{least} to {most} seeds'}"

    def place(self, each: Summary) -> str:
        """The data set, and its eps where not all have the same."""
        return set_words(each.row) + (f" at eps {_eps(each)}" if self._eps_differ else "")

    @property
    def _eps_differ(self) -> bool:
        return len({each.budgets for each in self.reference}) > 1

    def time(self, group: Sequence[Summary]) -> float:
        return median(_time(each, self.measured) for each in group)

    def times(self, group: Sequence[Summary]) -> str:
        """The time in words. That of one training, measured twice, differs in the second place."""
        return f"{self.time(group):{'.1f' if self.measured else '.2f'}} times"

    def caution(self) -> str:
        """What the figures of the attacks that `answer` chose do not say; empty where it chose none."""
        chosen = [group for group in (self._cheapest(), self._best()) if group and group[0].attack != group[0].against]
        if not chosen:
            return ""
        words = f"The choice among {len(self.attacks)} attacks was made on the images that judge"
        if any(each.runs < 2 * len(each.budgets) for each in self.reference):
            words += "; where there is one seed an interval is of images alone"
        if any(each.to_fgsm[1] < -LITTLE for group in chosen for each in group if each.to_fgsm):
            words += f"; an interval that goes below {100 * -LITTLE:g} leaves a larger loss open"
        return f"{words}."

    def answer(self) -> str:
        """The cheapest attack that loses little to FGSM, and the most robust of those that take no longer."""
        cheapest, best = self._cheapest(), self._best()
        of_fgsm, others = self.time(self.reference), [e for e in self.attacks.values() if e[0].attack != e[0].against]
        if all(self.time(each) > SAME_TIME * of_fgsm for each in others):
            return "Every other attack takes longer."
        where = "" if len(self.reference) == 1 else " on some data set" if cheapest is None else " on each data set"
        if all(self.time(each) >= of_fgsm / SAME_TIME for each in others):
            first = "No other attack is cheaper"
        elif cheapest is None:
            first = f"Every cheaper attack loses more than {100 * LITTLE:g} point to it{where}"
        else:
            what = f"The cheapest attack that loses at most {100 * LITTLE:g} point to it{where}"
            first = f"{what} is {self._named(cheapest)}"
        if best[0].attack == best[0].against:
            return f"{first}. None that takes no longer is more robust."
        if cheapest is not None and best[0].attack == cheapest[0].attack:
            return f"{first}; none that takes no longer than {best[0].against} is more robust."
        return f"{first}. The most robust that takes no longer is {self._named(best)}."

    def _cheapest(self) -> Sequence[Summary] | None:
        """The cheapest attack that loses little to FGSM, among those that take clearly less time."""
        most = self.time(self.reference) / SAME_TIME
        near = [group for group in self.attacks.values() if self.time(group) < most and min(_lost(group)) >= -LITTLE]
        return min(near, key=self.time, default=None)

    def _best(self) -> Sequence[Summary]:
        """The attack with the highest accuracy, among FGSM and those that take no longer."""
        most = SAME_TIME * self.time(self.reference)
        rivals = [group for group in self.attacks.values() if self.time(group) <= most]
        return max(rivals, key=lambda group: mean(_lost(group)))

    def _named(self, group: Sequence[Summary]) -> str:
        of = listed(f"{interval(*each.to_fgsm)} on {self.place(each)}" for each in group if each.to_fgsm)
        found = ((*at, each) for each in group if each.by_eps for at in zip(each.by_eps, each.budgets, strict=True))
        worst, eps, where = min(found, key=lambda at: at[0])
        if worst < -LITTLE and len(group[0].budgets) > 1:
            of += f", the least {points(worst)} at eps {eps:g} on {set_words(where.row)}"
        clean = {each.row: each.clean for each in self.reference}
        changes = listed(points(each.clean - clean[each.row]) for each in group)
        return f"{group[0].attack} ({of}; clean accuracy {changes}; {self.times(group)})"


def _eps(of: Summary) -> str:
    return listed(f"{each:g}" for each in of.budgets)


def _lost(group: Sequence[Summary]) -> list[float]:
    """The differences to FGSM; its own are 0."""
    return [each.to_fgsm[0] if each.to_fgsm else 0.0 for each in group]


def _time(each: Summary, measured: bool) -> float:
    return each.time if measured and each.time is not None else each.predicted


def rows(found: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """A table of the means over eps: (its head, a row for each data set, method and attack).

    Args:
        found: what training attacks cost and bring, over eps.
    """
    several = len({each.row.model for each in found}) > 1
    head = ["data", "method", "attack", "eps", "cells", "time", "clean", judge_words(HEADLINE_JUDGE), "minus FGSM's"]
    head += ["at each eps", "signs that stay"]
    body = [
        [
            set_words(each.row),
            method_words(each.row.method) + (f" of {each.row.model}" if several else ""),
            each.attack,
            listed(f"{eps:g}" for eps in each.budgets),
            str(each.runs),
            f"{each.predicted:.2f} foretold" if each.time is None else f"{each.time:.2f}",
            f"{100 * each.clean:.1f} %",
            f"{100 * each.robust:.1f} %",
            interval(*each.to_fgsm) if each.to_fgsm else "",
            listed(map(points, each.by_eps)) if each.by_eps and len(each.by_eps) > 1 else "",
            "" if each.agreement is None else f"{100 * each.agreement:.0f} %",
        ]
        for each in found
    ]
    return head, body


def table(found: Sequence[Summary]) -> str:
    """The table of `rows` in Markdown."""
    return markdown(*rows(found), left=3)
