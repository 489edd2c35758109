"""Tables of a report: the accuracy of each class, and the confusions between classes."""

from collections.abc import Sequence

import numpy as np

from fastadv._extras import require
from fastadv.attacks.verdicts import NONE
from fastadv.evaluation.report import html
from fastadv.evaluation.report.curves import png, whole_numbers

MOST = 20  # with more classes the confusions are a picture, and a list of classes is folded
WORST = 10  # with more classes the ten worst ones are shown

Triples = Sequence[tuple[int, int, int]]


def matrix_of(triples: Triples, count: int) -> np.ndarray:
    """The confusion matrix: the number of samples of each class (row) by the class that the model predicts (column).

    Args:
        triples: (class, predicted class, number of samples), as in the last record of a run.
        count: the number of classes.

    Returns:
        int64 (count, count + 1); the last column counts samples without a prediction.
    """
    matrix = np.zeros((count, count + 1), np.int64)
    for label, said, samples in triples:
        matrix[label, count if said == NONE else said] += samples
    return matrix


def by_class(clean: np.ndarray, attacked: np.ndarray, classes: Sequence[str]) -> str:
    """A table with a row for each class: its images, and how many the model gets right, clean and under attack."""
    counts, (right, robust) = clean.sum(1), (matrix.diagonal() for matrix in (clean, attacked))
    rows = [
        [html.name(i, classes), str(counts[i]), *(_share(part[i], counts[i]) for part in (right, robust))]
        for i in range(len(classes))
    ]
    head = ["class", "images", "clean", "robust"]
    if len(classes) <= MOST:
        return html.table(head, rows, "numbers")
    worst = sorted(np.flatnonzero(counts), key=lambda i: (robust[i] / counts[i], right[i] / counts[i], i))[:WORST]
    few = html.table(head, [rows[i] for i in worst], "numbers")
    least = html.paragraph(f"The {len(worst)} least robust classes:")
    return least + few + html.folded(f"all {len(classes)} classes", html.table(head, rows, "numbers"))


def confusion_table(matrix: np.ndarray, classes: Sequence[str]) -> str:
    """The confusion matrix as a table; with many classes as a picture, and the largest confusions as a table."""
    if len(classes) <= MOST:
        return _as_table(matrix, classes)
    words = html.paragraph(
        "A row for each class, a column for what the model says; darker is more of the class's images."
    )
    return words + html.image(_as_picture(matrix), "confusion matrix") + _largest(matrix, classes)


def _as_table(matrix: np.ndarray, classes: Sequence[str]) -> str:
    silent = matrix[:, -1].any()
    shown = matrix if silent else matrix[:, :-1]
    shares = shown / matrix.sum(1, keepdims=True).clip(1)
    head = ["class \\ says", *(str(i) for i in range(len(classes))), *(["none"] if silent else [])]
    rows = [
        [html.name(i, classes), *(_cell(count, share) for count, share in zip(shown[i], shares[i], strict=True))]
        for i in range(len(classes))
    ]
    return html.table(head, rows, "matrix")


def _cell(count: int, share: float) -> str:
    return f'<div style="background: rgb(0 121 140 / {0.6 * share:.2f})">{count or ""}</div>'


def _as_picture(matrix: np.ndarray) -> bytes:
    figure = require("matplotlib.figure").Figure(figsize=(6, 6), layout="constrained")
    axis = figure.subplots()
    shares = matrix[:, :-1] / matrix.sum(1, keepdims=True).clip(1)
    axis.imshow(np.sqrt(shares), cmap="Greys", vmin=0, vmax=1)  # the root shows rare confusions too
    axis.set(xlabel="number of the class that the model says", ylabel="number of the class")
    for side in (axis.xaxis, axis.yaxis):
        whole_numbers(side)
    return png(figure)


def _largest(matrix: np.ndarray, classes: Sequence[str]) -> str:
    wrong = matrix[:, :-1].copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[: 2 * WORST]
    pairs = [divmod(int(i), wrong.shape[1]) for i in order if wrong.flat[i]]
    if not pairs:
        return html.paragraph("No class is taken for another.")
    counts = matrix.sum(1)
    rows = []
    for label, said in pairs:
        part, whole = wrong[label, said], counts[label]
        images = f"{part} of {whole} images, {_share(part, whole)}"
        rows.append([html.name(label, classes), html.name(said, classes), images])
    return html.table(["class", "taken for", "how often"], rows)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
