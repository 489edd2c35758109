"""Curves of a report: accuracies over the epochs, and robust accuracy over the budget."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadv._extras import require
from fastadv.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Record = Mapping[str, Any]  # a record that `Trainer.fit` returns, such as that of an epoch

LINES = {
    "clean_accuracy": ("clean, validation", "#6c757d", "-"),
    "robust_accuracy": ("PGD-10, validation", "#00798c", "-"),
    "train_accuracy": ("training attack, training", "#d1495b", "-"),
    "probe_pgd": ("PGD-5, probe", "#00798c", ":"),
}


def over_epochs(records: Sequence[Record]) -> bytes:
    """The accuracies over the epochs, which count from 1, as a PNG file.

    Args:
        records: the records that `Trainer.fit` returned.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure").Figure(figsize=(8, 3.2), layout="constrained")
    axis = figure.subplots()
    epochs = [record for record in records if "epoch" in record]
    for key, (label, colour, style) in LINES.items():
        points = [(record["epoch"] + 1, 100 * record[key]) for record in epochs if record.get(key) is not None]
        if points:
            marker = "." if len(points) < 3 else ""
            # Without clipping markers and lines are whole at 0 and 100 %.
            axis.plot(*zip(*points, strict=True), style, color=colour, label=label, marker=marker, clip_on=False)
    first, last = (epochs[i]["epoch"] + 1 for i in (0, -1))
    room = 0.5 if last == first else 0.02 * (last - first)
    axis.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 100), xlim=(first - room, last + room))
    whole_numbers(axis.xaxis)
    axis.grid(axis="y", color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return png(figure)


def write_curves(path: str | Path, curves: Sequence[Mapping[str, Any]]) -> None:
    """Write robust accuracy over the budget as a PNG file.

    Args:
        path: the file.
        curves: the curves that `fastadv.evaluation.evaluate` returned, one for each norm.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = require("matplotlib.figure").Figure(figsize=(4.5 * len(curves), 3.2), layout="constrained")
    for axis, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        _over_budget(axis, curve)
    write_atomically(path, png(figure))


def _over_budget(axis: "Axes", curve: Mapping[str, Any]) -> None:
    scale, unit = (255, " / 255") if curve["norm"] == "Linf" else (1, " in L2")
    eps, robust = ([scale * e for e in curve["eps"]], [100 * share for share in curve["robust_accuracy"]])
    axis.plot(eps, robust, color="#00798c", marker=".")
    axis.fill_between(eps, robust, color="#00798c", alpha=0.15)
    axis.set(xlabel=f"eps{unit}", ylabel="robust accuracy, %", xlim=(0, eps[-1]), ylim=(0, 100))
    axis.set_title(
        f"mean {100 * curve['area']:.1f} %, expected robustness {scale * curve['expected_robustness']:.3g}{unit}",
        fontsize=9,
    )
    axis.spines[["top", "right"]].set_visible(False)


def whole_numbers(axis: "Axis") -> None:
    """Put the ticks of an axis at whole numbers."""
    axis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True, min_n_ticks=1))


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
