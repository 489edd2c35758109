"""What an attack maximises: one value per sample, from logits (N, C) and targets."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def ce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with int64 labels (N,) or soft labels (N, C)."""
    return F.cross_entropy(logits, targets, reduction="none")


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The best other logit minus the label's: positive where the sample is misclassified.

    Carlini and Wagner 2017 (arXiv 1608.04644, section 5), without the cut at kappa.
    """
    own = labels[:, None]
    return logits.scatter(1, own, -torch.inf).amax(1) - logits.gather(1, own)[:, 0]


def dlr(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Difference of logits ratio: the margin over the distance of the first logit from the third; 3 classes at least.

    Croce and Hein 2020 (arXiv 2003.01690, section 4.2).
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the loss dlr takes 3 classes at least, the model has {logits.shape[1]}: use margin or ce")
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return margin(logits, labels) / (first - third + 1e-12)


def kl(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """KL(probabilities || softmax(logits)): Zhang et al. 2019, TRADES (arXiv 1901.08573, section 3.3)."""
    return F.kl_div(F.log_softmax(logits, dim=1), probabilities, reduction="none").sum(1)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "ce": ce,
    "margin": margin,
    "dlr": dlr,
    "kl": kl,
}
