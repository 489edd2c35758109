"""The parts that a set does not have: a validation and a test part, split off the training part."""

import math
from collections.abc import Sequence

import torch

from fastadv.data.source import Part, Source

TEST_SHARE = 0.2
MOST_VALIDATION = 2000


def completed(
    source: Source, validation: float, seed: int, wanted: Sequence[int]
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """The parts "train", "val" and "test", and notes on what was made here; only `wanted` classes need images."""
    parts, notes = dict(source.parts), ()
    if "test" not in parts:
        parts["train"], parts["test"] = _split(parts["train"], TEST_SHARE, source.classes, seed, wanted)
        notes = (f"the set has no test part: a fifth of its training part is the test part, chosen by seed {seed}",)
    if "val" not in parts:
        share = min(validation, MOST_VALIDATION / max(1, len(parts["train"].labels)))
        parts["train"], parts["val"] = _split(parts["train"], share, source.classes, seed, wanted)
    return parts, notes


def _split(part: Part, share: float, classes: tuple[str, ...], seed: int, wanted: Sequence[int]) -> tuple[Part, Part]:
    """What stays, and what is split off: `share` of each class, rounded down, at least one; nothing where it is 0."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(part.labels), dtype=torch.bool)
    for label in part.labels.unique().tolist() if share else ():
        members = (part.labels == label).nonzero()[:, 0]
        if len(members) < 2:
            if label not in wanted:
                continue
            raise ValueError(
                f"class {classes[label]!r} has a single training image, and a part must be split off: "
                "add images, leave the class out, or give parts of your own (validation=0 makes no validation part)"
            )
        # Rounded first: 0.29 * 100 is a little below 29.
        count = min(max(1, math.floor(round(share * len(members), 6))), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return part.take((~held).nonzero()[:, 0]), part.take(held.nonzero()[:, 0])
