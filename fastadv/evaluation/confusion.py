"""Which classes are taken for which others, without an attack and under one."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch


def confusions(labels: torch.Tensor, report: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """Counts of what the model takes each class for, on clean images and under the report's first attack.

    A sample that the attack does not fool is taken for its class; one that is wrong without it stays what it is. What
    the model says is -1 where it gives no prediction.

    Args:
        labels: int64 (N,).
        report: what `evaluate` returned for these samples.

    Returns:
        Under "clean" and "attacked" a list of [class, what the model says, number of samples].
    """
    clean, first = report["clean_said"], report["attacks"][0]
    attacked = [new if fooled else old for new, old, fooled in zip(first["said"], clean, first["fooled"], strict=True)]
    said = {"clean": clean, "attacked": attacked}
    return {name: _counted(zip(labels.tolist(), classes, strict=True)) for name, classes in said.items()}


def _counted(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    return [[*pair, count] for pair, count in sorted(Counter(pairs).items())]
