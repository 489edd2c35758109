"""Which figures a study has, each drawn for the page and for a file."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fastadv.study import figures, paper_table
from fastadv.study.reading import Study
from fastadv.study.results import HEADLINE_JUDGE, attack_words, grouped, judge_words, method_words, set_words


@dataclass(frozen=True)
class Drawing:
    """A figure that is drawn.

    Attributes:
        words: what it shows.
        caption: the line below it; may be empty.
        svg: the drawing for the page.
        png: the drawing for a file.
    """

    words: str
    caption: str
    svg: str
    png: bytes


def drawn(study: Study) -> dict[str, Drawing]:
    """All figures of a study: {name of the file, without its ending: the drawing}.

    Raises:
        ImportError: matplotlib is not installed.
    """
    models = list(dict.fromkeys(each.cell.model for each in study.results))
    found = {}
    for number, model in enumerate(models):
        of = model if len(models) > 1 else ""
        mine = [each for each in study.averages if each.model == model and each.judge in paper_table.JUDGES]
        for (attack, judge), shown in grouped(mine, lambda each: (each.attack, each.judge)):
            words = f"{attack_words(attack)} minus PGD by eps, judged by {judge_words(judge)}"
            found[f"difference-{number}-{attack}-{judge}"] = of, words, figures.difference_by_eps(shown)
        runs = [each for each in study.courses if each.result.cell.model == model and each.result.fast]
        for attack, group in grouped(runs, lambda each: each.result.cell.attack):
            words = f"{attack_words(attack)}: failed runs by method and eps, of those where a failure would show"
            found[f"map-{number}-{attack}"] = of, words, figures.stability_map(group)
            for method, of_method in grouped(group, lambda each: each.result.cell.method):
                words = f"{method_words(method)} with {attack_words(attack)}: accuracy over epochs"
                found[f"curves-{number}-{attack}-{method}"] = of, words, figures.curves(of_method)
    but_eps = grouped(study.prices, lambda each: (replace(each.row, eps=0.0), each.shared))
    for number, (_, prices) in enumerate(but_eps):
        row = prices[0].row
        words = f"{method_words(row.method)}: accuracy under {judge_words(HEADLINE_JUDGE)} over the time of training"
        of = f"{set_words(row)} {method_words(row.method)} {row.model}"
        found[f"price-{number}"] = of, words, figures.price_curve(prices)
    drawings = {}
    for name, (caption, words, figure) in found.items():
        name = re.sub("[^A-Za-z0-9 .+_-]", "_", name)  # a file's name, whatever a cell from elsewhere calls its attack
        svg = figures.svg(figure, f"{words} {caption}".strip())
        drawings[name] = Drawing(words, caption, svg, figures.png(figure))
    return drawings


def first_screen(names: Iterable[str]) -> list[str]:
    """The names of the figures on the first screen: the difference and the map of FGSM, or of the first fast attack."""
    chosen = []
    for kind, end in (("difference-0-", f"-{HEADLINE_JUDGE}"), ("map-0-", "")):
        found = [name for name in names if name.startswith(kind) and name.endswith(end)]
        chosen += sorted(found, key=lambda name: name != f"{kind}fgsm{end}")[:1]
    return chosen
