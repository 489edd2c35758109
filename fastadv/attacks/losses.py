"""The losses that an attack maximises: one value per sample, from logits (N, C) and their targets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

LossFunction = Callable[[Any, Any], torch.Tensor]
"""From a model's outputs and their targets to one value per sample, (N,)."""


@dataclass(frozen=True)
class Loss:
    """A loss by name: called with logits (N, C) and targets, it gives one value per sample, (N,).

    Args:
        of: the function.
        compares: what the targets are: "labels", int64 (N,); "soft", these or probabilities (N, C); "clean", the
            probabilities (N, C) for the clean images; "pairs", int64 (N, 2), the label and the class that the sample is
            driven to; "signs", 0 or 1 for each logit, (N, C), or int64 (N,) for a single one.
        squashes: "softmax" or "sigmoid" where it takes one of the logits, which must then be none already; else "".
    """

    of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    compares: str = "labels"
    squashes: str = ""

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.of(logits, targets)


def ce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with int64 labels (N,) or soft labels (N, C); a class of probability 0 may have a logit of -inf."""
    if not targets.is_floating_point():
        return F.cross_entropy(logits, targets, reduction="none")
    if targets.shape != logits.shape:
        raise ValueError(
            f"soft labels {tuple(targets.shape)} are not one probability for each of the logits {tuple(logits.shape)}"
        )
    return -(targets * _possible(F.log_softmax(logits, dim=1), targets)).sum(1)


def bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, summed over the logits: for one logit, or one for each of several labels a sample."""
    if targets.numel() != logits.numel():
        raise ValueError(
            f"the loss bce takes a label of 0 or 1 for each logit, and labels {tuple(targets.shape)} are not one for "
            f"each of {tuple(logits.shape)}"
        )
    targets = targets.reshape(logits.shape).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The best other logit minus the label's: positive where the sample is misclassified.

    Carlini and Wagner 2017 (arXiv 1608.04644, section 5), without the cut at kappa.
    """
    own = labels[:, None]
    return logits.scatter(1, own, -torch.inf).amax(1) - logits.gather(1, own)[:, 0]


def targeted_margin(logits: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The other class's logit minus the label's."""
    own, other = logits.gather(1, pairs).unbind(1)
    return other - own


def dlr(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Difference of logits ratio: the margin over the distance of the first logit from the third.

    Croce and Hein 2020 (arXiv 2003.01690, section 4.2). Of two classes, whose ratio is +-1 everywhere, the margin. A
    class that cannot be, with a logit of -inf, is none.
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return margin(logits, labels) / _distance(first, third)


def targeted_dlr(logits: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The targeted margin over the distance of the first logit from the mean of the third and the fourth.

    Croce and Hein 2020 (arXiv 2003.01690, section 4.2). Of three classes the mean of the second and the third: by the
    third alone, the ratio towards the last class would be -1 everywhere. Of two the margin itself. A class that cannot
    be, with a logit of -inf, is none.
    """
    classes = logits.shape[1]
    if classes < 3:
        return targeted_margin(logits, pairs)
    highest = logits.topk(min(classes, 4), dim=1).values
    first, second, third = highest[:, :3].unbind(1)
    fourth = highest[:, 3] if classes > 3 else second
    fourth = torch.where(fourth > -torch.inf, fourth, second)
    return targeted_margin(logits, pairs) / _distance(first, (third + fourth) / 2)


def _distance(first: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """first - other, by which a margin is divided; 1 where `other` is -inf, the logit of a class that cannot be."""
    return torch.where(other > -torch.inf, first - other + 1e-12, 1.0)


LABEL, OTHER, BOTH = 0, 1, 2  # what of the probabilities is climbed: away from the label's, to the best other's
TO_CLASS = 3  # plus a class: the margin to it


def probability_margin(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The best other class's probability minus the label's, p_m - p_y.

    Its gradient is the true one divided by a positive factor of each sample: by 1 - p_y for LABEL, by p_y (1 - p_y) for
    OTHER and by p_m for BOTH. So it does not vanish where the model is sure.

    Args:
        logits: (N, C).
        targets: labels (N,); or (N, 2), the label and what is climbed: LABEL for -p_y, OTHER for p_m, BOTH for their
            sum, TO_CLASS + t for the logit of class t minus the label's.

    Returns:
        (N,).

    Source:
        Xie et al. 2025 (arXiv 2411.15210).
    """
    own, kind = (
        targets.split(1, 1) if targets.ndim == 2 else (targets[:, None], torch.full_like(targets, BOTH)[:, None])
    )
    label, other = kind == LABEL, kind == OTHER
    with torch.no_grad():
        others = logits.scatter(1, own, -torch.inf)
        rest = others.logsumexp(1, keepdim=True)
        share = (others - rest).exp()  # of the probability that is not the label's
        ahead = logits.gather(1, own) - rest
        p_own, p_rest = ahead.sigmoid(), (-ahead).sigmoid()
        share_best, best = share.max(1, keepdim=True)
        p_best = share_best * p_rest
        factors = torch.where(label, share, torch.where(other, -p_rest * share, share * (p_own - p_best)))
        at_best = torch.where(other, 1 - p_best, share_best * (1 - p_best + p_own))
        at_own = torch.where(label, -1.0, torch.where(other, -p_own, -p_own * (1 + share_best)))
        factors = factors.scatter(1, best, torch.where(label, share_best, at_best)).scatter(1, own, at_own)
        value = torch.where(label, -p_own, torch.where(other, p_best, p_best - p_own))[:, 0]
        driven, to = kind >= TO_CLASS, (kind - TO_CLASS).clamp(min=0)
        margins = torch.zeros_like(factors).scatter(1, to, 1.0).scatter(1, own, -1.0)
        factors = torch.where(driven, margins, factors)
        value = torch.where(driven, logits.gather(1, to) - logits.gather(1, own), value[:, None])[:, 0]
    # A class that cannot be has a logit of -inf and a factor of 0, whose product would be NaN.
    climb = torch.where(factors == 0, 0.0, factors * logits).sum(1)
    return value + (climb - climb.detach()).nan_to_num(0.0)


def kl(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """KL(probabilities || softmax(logits)): Zhang et al. 2019, TRADES (arXiv 1901.08573, section 3.3).

    A class that is impossible in both, with logits of -inf, adds nothing.
    """
    return F.kl_div(_possible(F.log_softmax(logits, dim=1), probabilities), probabilities, reduction="none").sum(1)


def _possible(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """0 where the target is 0: there the product is 0 whatever the other factor, and -inf would make it NaN."""
    return log_probabilities.masked_fill(targets == 0, 0.0)


LOSSES: dict[str, Loss] = {
    "ce": Loss(ce, "soft", squashes="softmax"),
    "margin": Loss(margin),
    "dlr": Loss(dlr),
    "probability_margin": Loss(probability_margin, squashes="softmax"),
    "targeted_margin": Loss(targeted_margin, "pairs"),
    "targeted_dlr": Loss(targeted_dlr, "pairs"),
    "bce": Loss(bce, "signs", squashes="sigmoid"),
    "kl": Loss(kl, "clean", squashes="softmax"),
}
"""Losses by name, and with what each compares the logits."""
