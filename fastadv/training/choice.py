"""How a run chooses among its weights: by which accuracy, and how far chance may have made the choice."""

import math
from typing import Any

from fastadv.training.foreign import TrainAttack
from fastadv.training.progress import Progress


def criteria(attack: str | TrainAttack | None) -> tuple[str, ...]:
    """The accuracies by which weights are chosen, the most important one first. Of equal weights the latest are taken.

    Args:
        attack: the training attack; None for training on clean images.
    """
    return ("clean_accuracy",) if attack is None else ("robust_accuracy", "clean_accuracy")


def choice(at: Progress, by: str, count: int) -> dict[str, Any]:
    """The accuracy by which the weights were chosen, and the epochs that are worse by no more than chance may explain.

    Args:
        at: the progress of a run that has a best epoch.
        by: the name of the accuracy in the records of the epochs.
        count: the number of images on which it was measured.

    Returns:
        "chosen_by", "noise" (two standard errors of the best accuracy) and "within_noise" (the other epochs that were
        worse by no more than that).
    """
    rows = [record for record in at.records if by in record and record.get("epoch", -1) >= at.first_epoch]
    shares = {record["epoch"]: record[by] for record in rows}
    best = shares.pop(at.best_epoch)
    noise = two_standard_errors(best, count)
    near = [epoch for epoch, share in shares.items() if best - share <= noise]
    return {"chosen_by": by, "noise": noise, "within_noise": near}


def two_standard_errors(share: float, count: int) -> float:
    """Two standard errors of a share of `count` images; it is not 0 for shares of 0 and 1.

    Source: Agresti and Coull 1998, "Approximate is better than 'exact' for interval estimation of binomial
    proportions".
    """
    middle = (share * count + 2) / (count + 4)
    return 2 * math.sqrt(middle * (1 - middle) / (count + 4))
