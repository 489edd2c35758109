"""The table of training attacks: what each loses to PGD, how often it overfits, and its time."""

from collections.abc import Iterable, Sequence

from fastadv.study.grid import SCRATCH
from fastadv.study.overfitting import Course
from fastadv.study.price import JUDGE
from fastadv.study.results import attack_words, judge_words
from fastadv.study.statistics import Average
from fastadv.study.timing import Time
from fastadv.study.words import points

Table = tuple[list[str], list[list[str]]]


def rows(averages: Sequence[Average], times: Iterable[Time], courses: Iterable[Course]) -> tuple[str, Table] | None:
    """The attacks of one model and method: those that have the most attacks.

    Args:
        averages: the differences to PGD, averaged over data sets.
        times: the times of methods with attacks.
        courses: how the runs went.

    Returns:
        (the method, (the head, a row for each attack)); None where no method has two attacks that are compared.
    """
    judged = [each for each in averages if each.judge == JUDGE and len(each.methods) == 1]
    attacks: dict[tuple[str, str], dict[str, None]] = {}
    for each in judged:
        attacks.setdefault((each.model, each.methods[0]), {})[each.attack] = None
    found = {key: names for key, names in attacks.items() if key[1] != SCRATCH and len(names) > 1}
    if not found:
        return None
    model, method = max(found, key=lambda key: (len(found[key]), key[1] == "full"))
    shown = {(each.attack, each.eps): each for each in judged if (each.model, each.methods) == (model, (method,))}
    budgets = sorted({eps for _, eps in shown if sum(each == eps for _, each in shown) > 1})
    runs = [each for each in courses if (each.result.cell.model, each.result.cell.method) == (model, method)]
    time = {each.attack: each.to_pgd or each.predicted_to_pgd for each in times if each.method == method}
    head = ["training attack", "time / PGD's"]
    for eps in budgets:
        head += [f"eps {eps:g}: minus PGD's under {judge_words(JUDGE)}", "overfitted"]
    body = []
    for attack in sorted(found[model, method], key=lambda name: (time.get(name) or 0.0, name)):
        cells = [
            cell for eps in budgets for cell in (_difference(shown.get((attack, eps))), _fallen(runs, attack, eps))
        ]
        ratio = time.get(attack)
        body.append([attack_words(attack), "" if ratio is None else f"{ratio:.2f}", *cells])
    return method, (head, body)


def _difference(each: Average | None) -> str:
    return "" if each is None else "{} ({} to {})".format(*map(points, (each.mean, each.low, each.high)))


def _fallen(runs: Iterable[Course], attack: str, eps: float) -> str:
    """How many runs overfitted: "2 of 6", or "1 and partly 1 of 6"."""
    found = [each for each in runs if (each.result.cell.attack, each.result.cell.eps) == (attack, eps)]
    collapsed, partly = (sum(getattr(each, name) is not None for each in found) for name in ("collapse", "partly"))
    if not found:
        return ""
    return f"{collapsed}{f' and partly {partly}' if partly else ''} of {len(found)}"
