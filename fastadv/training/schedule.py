"""The learning rate over the steps of a run."""

import math


def lr_factor(step: int, warmup: int, total: int) -> float:
    """Factor of the peak learning rate at `step` of `total`, counted from 0.

    Linear over the first `warmup` steps, from 1/warmup (a step at rate 0 would train nothing) to 1; then half a cosine
    that reaches 0 at `total`. With a warm-up of 2 steps of 10: 0.5, 1, 1, 0.96, ..., 0.15, 0.04.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
