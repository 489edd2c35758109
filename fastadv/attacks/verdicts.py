"""The class that a row of logits names, if it names one."""

import torch

NONE = -1  # no class's number, so that it equals no label
SILENT = "a logit is NaN, or all are equal"  # when there is none, for messages


def predicted(logits: torch.Tensor) -> torch.Tensor:
    """The class of the largest logit, of two that are equal the lower one; -1 where there is no prediction.

    A single logit says class 1 where it is positive, and class 0 where it is negative. There is no prediction where a
    logit is NaN, where all of two or more are equal, or a single one is 0: whatever the label, that is wrong.

    Args:
        logits: (N, C) floats.

    Returns:
        int64 (N,).
    """
    if logits.shape[1] == 1:
        logits = torch.cat((torch.zeros_like(logits), logits), 1)
    highest, classes = logits.max(1)
    lowest = logits.amin(1)
    # Both are NaN where one logit is, and then neither comparison holds.
    return torch.where(lowest < highest, classes, NONE)


def verdict(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What the model says of each sample, int64 (N,): a class as in `predicted`, to compare with the label.

    Of several labels a sample, 0 or 1 for each logit (N, C), there is nothing to compare but the sample as a whole: 1
    where every logit's sign is that of its label, 0 where one is not, -1 where a logit is NaN or 0.
    """
    if labels.ndim == 1:
        return predicted(logits)
    right = ((logits > 0) == (labels > 0.5)).all(1).long()
    return torch.where((logits.isnan() | (logits == 0)).any(1), NONE, right)


def is_label(said: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether `verdict` was right, (N,) bool."""
    return said == (labels if labels.ndim == 1 else 1)
