"""The outcomes of an attack's runs, image by image, and which of two is the stronger."""

import torch

from fastadv.attacks.samplewise import per_sample

Outcome = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Of a run: (images (N, ...), their strength (N,), which of them fooled the model, (N,) bool, or None where outputs or
targets are no classes)."""


def better_where(best: Outcome, new: Outcome) -> torch.Tensor:
    """Where the new outcome is stronger than the best so far, (N,) bool.

    An image that fooled the model comes before one that did not; then the larger strength counts, and NaN is the
    smallest.
    """
    better = (new[1] > best[1]) | (best[1].isnan() & ~new[1].isnan())
    if new[2] is None or best[2] is None:
        return better
    return (new[2] & ~best[2]) | ((new[2] == best[2]) & better)


def stronger(best: Outcome, new: Outcome) -> Outcome:
    """For each image the stronger of two outcomes; the best so far where they are equal."""
    better = better_where(best, new)

    def chosen(n: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(per_sample(better, b), n, b)

    fooled = None if new[2] is None or best[2] is None else chosen(new[2], best[2])
    return chosen(new[0], best[0]), chosen(new[1], best[1]), fooled
