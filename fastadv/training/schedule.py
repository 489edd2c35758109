"""The learning rate over the steps of a run."""

import math


def lr_factor(step: int, warmup: int, total: int) -> float:
    """The factor of the peak learning rate.

    Over the first `warmup` steps it rises linearly from 1 / warmup to 1. (It does not begin with 0, which would waste a
    step.) Then it falls as half a cosine, which would reach 0 at step `total`. With 2 of 10 steps as warm-up:
    0.5, 1, 1, 0.96, ..., 0.15, 0.04.

    Args:
        step: the number of the step, from 0.
        warmup: the number of steps of the warm-up.
        total: the number of all steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
