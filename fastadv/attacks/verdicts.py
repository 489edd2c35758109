"""The class that a row of logits names, if it names one."""

import torch

NONE = -1  # no class's number, so that it equals no label
SILENT = "a logit is NaN, or all are equal"  # when there is none, for messages


def predicted(logits: torch.Tensor) -> torch.Tensor:
    """The class of the largest logit, of two that are equal the lower one; -1 where there is no prediction.

    There is none where a logit is NaN, or where all of two or more are equal: whatever the label, that is wrong.

    Args:
        logits: (N, C) floats.

    Returns:
        int64 (N,).
    """
    highest, classes = logits.max(1)
    lowest = logits.amin(1)
    # Both are NaN where one logit is, and then neither comparison holds.
    says = lowest < highest if logits.shape[1] > 1 else lowest == highest
    return torch.where(says, classes, NONE)
