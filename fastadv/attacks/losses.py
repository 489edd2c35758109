"""What an attack maximises: one value per sample, from logits (N, C) and targets."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def ce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with int64 labels (N,) or soft labels (N, C); a class of probability 0 may have a logit of -inf."""
    if not targets.is_floating_point():
        return F.cross_entropy(logits, targets, reduction="none")
    return -(targets * _possible(F.log_softmax(logits, dim=1), targets)).sum(1)


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
    """KL(probabilities || softmax(logits)): Zhang et al. 2019, TRADES (arXiv 1901.08573, section 3.3).

    A class that is impossible in both, with logits of -inf, adds nothing.
    """
    return F.kl_div(_possible(F.log_softmax(logits, dim=1), probabilities), probabilities, reduction="none").sum(1)


def _possible(log_probabilities, targets):
    """0 where the target is 0: there the product is 0 whatever the other factor, and -inf would make it NaN."""
    return log_probabilities.masked_fill(targets == 0, 0.0)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "ce": ce,
    "margin": margin,
    "dlr": dlr,
    "kl": kl,
}
