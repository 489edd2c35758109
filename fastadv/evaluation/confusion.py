"""Counts which classes the model confuses, on clean images and under an attack."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch


def confusions(labels: torch.Tensor, report: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """The counts of (class, predicted class), on clean images and under the report's first attack.

    Under the attack a sample that is not fooled keeps its clean prediction, which is the label, or is wrong without an
    attack. Where the model gives no prediction, such as for NaN, the predicted class is -1.

    Args:
        labels: int64 (N,).
        report: the report of `evaluate` on these samples.

    Returns:
        {"clean": list, "attacked": list}, each a list of [class, predicted class, number of samples].
    """
    clean, first = report["clean_said"], report["attacks"][0]
    attacked = [new if fooled else old for new, old, fooled in zip(first["said"], clean, first["fooled"], strict=True)]
    said = {"clean": clean, "attacked": attacked}
    return {name: _counted(zip(labels.tolist(), classes, strict=True)) for name, classes in said.items()}


def _counted(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    return [[*pair, count] for pair, count in sorted(Counter(pairs).items())]
