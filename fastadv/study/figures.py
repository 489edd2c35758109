"""The figures of a study, as SVG for its page and as PNG files.

They name methods and attacks, but never data sets: a data set's name may have characters that the font lacks.
"""

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadv._extras import require
from fastadv.evaluation.report.curves import png, whole_numbers
from fastadv.evaluation.report.html import text
from fastadv.study.overfitting import Course, failed
from fastadv.study.paper_table import PAPER
from fastadv.study.price import Price
from fastadv.study.results import attack_words, judge_words, method_place, method_words
from fastadv.study.statistics import Average

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, for colour-blind readers too; the markers tell methods apart in black and white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#999999", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
ATTACK, UNDER_PGD = "#d55e00", "#0072b2"
# Fields of the map: (colour, what it means).
STABLE, SOME = ("#cfe6f3", "none failed"), ("#f3c77b", "some failed")
ALL, UNKNOWN = ("#c8501e", "all collapsed"), ("#ffffff", "not run, or not to be seen")
WIDTH = 4.1  # inches: the width of a phone's screen
LEAST_RANGE = 2.0  # points: the axis of differences has at least -2 to 2


def difference_by_eps(averages: Sequence[Average]) -> "Figure":
    """Each method's difference to PGD over eps, beside the paper's mean.

    Args:
        averages: averages of one model, attack and judge.
    """
    figure, axis = _axis(WIDTH, 3.3)
    budgets = sorted({each.eps for each in averages})
    methods = list(dict.fromkeys(each.methods for each in averages if len(each.methods) == 1))
    step = 0.7 / max(len(methods), 1)
    for number, names in enumerate(methods):
        mine = [each for each in averages if each.methods == names]
        places = [budgets.index(each.eps) + (number - (len(methods) - 1) / 2) * step for each in mine]
        means = np.array([100 * each.mean for each in mine])
        bounds = np.array([[100 * each.low, 100 * each.high] for each in mine]).T
        style: dict[str, Any] = {**_style(names[0]), "markersize": 5}
        lengths = np.abs(bounds - means)
        axis.errorbar(
            places, means, lengths, fmt="", linestyle="", elinewidth=1.2, label=method_words(names[0]), **style
        )
    paper = [(budgets.index(eps), 100 * mean) for eps, mean in PAPER.items() if eps in budgets]
    for number, (place, mean) in enumerate(paper):
        label = "the paper, PGD-10" if number == 0 else None
        axis.plot([place - 0.42, place + 0.42], [mean, mean], color="black", linewidth=1.2, linestyle=":", label=label)
    axis.axhline(0, color="#444444", linewidth=0.8)
    reach = max(LEAST_RANGE, *(250 * abs(each.mean) for each in averages))
    axis.set_ylim(
        max(axis.get_ylim()[0], min(-reach, *(105 * each.mean for each in averages))),
        min(axis.get_ylim()[1], max(reach, *(105 * each.mean for each in averages))),
    )
    _mark_cut(axis)
    axis.set_xticks(range(len(budgets)), [f"{eps:g}" for eps in budgets])
    one = averages[0]
    difference = f"{attack_words(one.attack)} minus PGD"
    axis.set(xlabel="eps, 1/255", ylabel=f"{difference}, points", xlim=(-0.6, len(budgets) - 0.4))
    axis.set_title(f"{difference}, judged by {judge_words(one.judge)}, with 95 % intervals", fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    return figure


def _mark_cut(axis: "Axes") -> None:
    """Put an arrow where an interval leaves the axis."""
    low, high = axis.get_ylim()
    for bars in axis.containers:
        for (x, least), (_, most) in bars[2][0].get_segments():
            for cut, place, marker in ((least < low, low, "v"), (most > high, high, "^")):
                if cut:
                    axis.plot(x, place, marker=marker, color="#444444", markersize=4, clip_on=False)


def stability_map(courses: Sequence[Course]) -> "Figure":
    """A table of methods by eps: how many runs collapsed, overfitted partly or are weak, of those where it would show.

    Args:
        courses: runs with one training attack.
    """
    methods = list(dict.fromkeys(each.result.cell.method for each in courses))
    methods.sort(key=lambda method: method == "scratch")
    budgets = sorted({each.result.cell.eps for each in courses})
    figure, axis = _axis(WIDTH, 1.5 + 0.42 * len(methods))
    for row, method in enumerate(methods):
        for column, eps in enumerate(budgets):
            runs = [each for each in courses if (each.result.cell.method, each.result.cell.eps) == (method, eps)]
            _field(axis, (column, row), *failed(runs))
    axis.set_xticks(range(len(budgets)), [f"{eps:g}" for eps in budgets])
    axis.set_yticks(range(len(methods)), [method_words(method) for method in methods])
    axis.set(xlabel="eps, 1/255", xlim=(-0.5, len(budgets) - 0.5), ylim=(len(methods) - 0.5, -0.5))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    attack = attack_words(courses[0].result.cell.attack)
    axis.set_title(f"{attack}: collapsed, partly overfitted and weak runs,\nof those where it would show", fontsize=9)
    fields = {str(field.get_label()): field for field in axis.patches}
    figure.legend(fields.values(), fields, frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    return figure


def _field(axis: "Axes", place: tuple[int, int], collapsed: int, partly: int, weak: int, runs: int) -> None:
    fell = collapsed + partly + weak
    colour, meaning = UNKNOWN if not runs else STABLE if not fell else ALL if collapsed == runs else SOME
    hatch = "///" if fell else ""  # tells the colours apart in black and white
    rectangle = require("matplotlib.patches").Rectangle
    corner = (place[0] - 0.47, place[1] - 0.45)
    edge = "#ffffff" if fell else "#cccccc"
    style = {"facecolor": colour, "edgecolor": edge, "hatch": hatch, "linewidth": 0.5}
    axis.add_patch(rectangle(corner, 0.94, 0.9, label=meaning, **style))
    more = [f"{count} {how}" for how, count in (("partly", partly), ("weak", weak)) if count]
    words = "\n".join([f"{collapsed} of {runs}", *more]) if runs else "-"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5} if fell else None
    size, weight = 8 - len(more), ("bold" if fell else None)
    axis.text(*place, words, ha="center", va="center", fontsize=size, bbox=box, weight=weight, linespacing=1.1)


def curves(courses: Sequence[Course]) -> "Figure":
    """The accuracy on the monitor's images over the epochs, under the training attack and under PGD-5, for each eps.

    Thin lines are runs, and heavy lines are their mean.

    Args:
        courses: runs of one method with one training attack.
    """
    budgets = sorted({each.result.cell.eps for each in courses})
    figure = _figure(max(0.6 + 1.45 * len(budgets), 2.9), 2.4)
    axes = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    attack = attack_words(courses[0].result.cell.attack)
    for axis, eps in zip(axes, budgets, strict=True):
        runs = [each for each in courses if each.result.cell.eps == eps]
        for field, colour, style, label in (
            ("probe_attack", ATTACK, "-", f"under {attack}"),
            ("probe_pgd", UNDER_PGD, "--", "under PGD-5"),
        ):
            _lines(axis, runs, field, colour, style, label)
        for each in runs:
            if each.collapse is not None:
                axis.plot(each.collapse + 1, 3, marker="x", color="black", markersize=5, clip_on=False)
        axis.set(xlabel="epoch", ylim=(0, 100))
        axis.set_title(f"eps {eps:g}", fontsize=9)
        whole_numbers(axis.xaxis)
        _plain(axis)
    axes[0].set_ylabel("accuracy, %")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    return figure


def _lines(axis: "Axes", runs: Iterable[Course], field: str, colour: str, style: str, label: str) -> None:
    by_epoch: dict[int, list[float]] = {}
    for each in runs:
        points = [(e["epoch"] + 1, 100 * e[field]) for e in each.result.epochs if e.get(field) is not None]
        axis.plot(*zip(*points, strict=True), style, color=colour, linewidth=0.6, alpha=0.35)
        for epoch, share in points:
            by_epoch.setdefault(epoch, []).append(share)
    mean = sorted((epoch, float(np.mean(shares))) for epoch, shares in by_epoch.items())
    marker = "." if len(mean) < 3 else ""
    axis.plot(*zip(*mean, strict=True), style, color=colour, linewidth=1.8, label=label, marker=marker)


def price_curve(prices: Sequence[Price]) -> "Figure":
    """Robust accuracy over the time of training, an attack each point, for each eps.

    A dotted line shows FGSM's accuracy. The bars are the 95 % intervals of the difference to FGSM. The accuracy without
    an attack, whose time is 1, is far below the others: it stands in the title.

    Args:
        prices: those of one data set, model and method with the same settings.
    """
    budgets, attacks = sorted({each.row.eps for each in prices}), list(dict.fromkeys(each.attack for each in prices))
    figure = _figure(max(0.8 + 2.1 * len(budgets), WIDTH), 3.3)
    measured = all(each.time is not None for each in prices)
    axes = figure.subplots(1, len(budgets), squeeze=False)[0]
    for axis, eps in zip(axes, budgets, strict=True):
        here = [each for each in prices if each.row.eps == eps]
        without = [f"{each.standard}: {100 * each.robust:.1f} %" for each in here if each.attack == each.standard]
        for each in (each for each in here if each.attack != each.standard or len(here) == 1):
            style: dict[str, Any] = _numbered(attacks.index(each.attack))
            bars, difference = None, each.difference
            if difference is not None:
                bars = [[100 * (difference.mean - difference.low)], [100 * (difference.high - difference.mean)]]
            time = each.time if measured else each.predicted
            axis.errorbar([time], [100 * each.robust], bars, linestyle="", label=each.attack, **style)
            if each.attack == each.against:
                axis.axhline(100 * each.robust, color="#444444", linewidth=0.8, linestyle=":")
        axis.set(xlabel=f"time{'' if measured else ' foretold'}, standard = 1")
        axis.set_title(", ".join([f"eps {eps:g}", *without]), fontsize=9)
        _plain(axis)
    axes[0].set_ylabel("accuracy under PMA, %")
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    return figure


# ---------------------------------------------------------------------- drawing


def _style(method: str) -> dict[str, str]:
    """The colour and the marker of a method, the same in all figures."""
    return _numbered(method_place(method)[0])


def _numbered(place: int) -> dict[str, str]:
    count = len(COLOURS)  # the tenth has the first one's colour, and another marker
    return {"color": COLOURS[place % count], "marker": MARKERS[(place + place // count) % count]}


def _figure(width: float, height: float) -> "Figure":
    figure: Figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure


def _axis(width: float, height: float) -> tuple["Figure", "Axes"]:
    figure = _figure(width, height)
    axis = figure.subplots()
    _plain(axis)
    return figure, axis


def _plain(axis: "Axes") -> None:
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.xaxis.label.set_fontsize(8)
    axis.yaxis.label.set_fontsize(8)


def svg(figure: "Figure", words: str) -> str:
    """The figure as an SVG element of a page. Letters are drawn as outlines, so the page loads no font.

    Args:
        figure: the figure.
        words: the description for people who cannot see it.
    """
    buffer = io.StringIO()
    with require("matplotlib").rc_context({"svg.fonttype": "path", "svg.hashsalt": words}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    drawing = buffer.getvalue()
    return f'<svg role="img" aria-label="{text(words)}"' + drawing[drawing.index("<svg") + len("<svg") :]


__all__ = ["curves", "difference_by_eps", "png", "price_curve", "stability_map", "svg"]
