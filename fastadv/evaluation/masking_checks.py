"""Signs that a robust accuracy says less than it seems to.

Athalye et al. 2018, "Obfuscated gradients give a false sense of security" (arXiv 1802.00420, section 3.1);
Carlini et al. 2019, "On evaluating adversarial robustness" (arXiv 1902.06705, section 4).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.pma import PMA, PMAL2
from fastadv.attacks.verdicts import SILENT
from fastadv.evaluation.adversaries import Adversary
from fastadv.evaluation.ensemble import Trial
from fastadv.evaluation.foreign import Reach
from fastadv.evaluation.images import Logits

CHANGE = 1e-3  # of the largest logit: far above rounding, far below what a verdict needs
ZERO, FEW = 0.1, 8  # share of gradients, of as many at least, that is no accident


def notes_on_outputs(
    logits: Logits, images: torch.Tensor, draws: int, autocast: torch.dtype | None = None
) -> Iterator[str]:
    """Notes on the model's outputs for one batch: are they the same again, and are they logits?

    Args:
        logits: the model.
        images: the batch, (N, ...).
        draws: of the model at each image, whose mean the outputs are.
        autocast: dtype in which the model runs; None: as it is.
    """
    change = CHANGE if autocast is None else 4 * torch.finfo(autocast).eps
    outputs = logits(images)
    # A class that cannot be has a logit of -inf, which is no scale and equals itself.
    allowed = change * outputs.nan_to_num(0.0, 0.0, 0.0).abs().max()
    if draws == 1 and ((logits(images) - outputs).abs() > allowed).any():
        yield (
            "the model's output is random: two calls with the same images differ, and gradients look masked. An attack "
            "then needs the gradient of many draws (eot=), and the verdicts hold for one draw"
        )
    elif draws == 1 and ((logits(images.flip(0)).flip(0) - outputs).abs() > allowed).any():
        yield (
            "the model's output for an image depends on the others in its batch, and the queue mixes batches: is "
            "batch-norm using the batch's statistics?"
        )
    if outputs.min() >= 0 and (outputs.sum(1) - 1).abs().max() < change:
        yield (
            "the model returns probabilities, not logits: cross-entropy takes a softmax of them once more, and "
            "gradients vanish. Pass the model without its softmax"
        )


def notes_on_gradients(counts: Iterable[tuple[str, int, int]]) -> Iterator[str]:
    """Notes on gradients, from (name, samples whose gradient is exactly 0 at the attack's start, samples looked at)."""
    for name, zero, looked in counts:
        if looked >= FEW and zero >= ZERO * looked:
            yield (
                f"the gradient is zero for {zero} of {looked} images where {name} starts: an attack by gradients "
                "cannot find its way. Is something in the model rounded or saturated?"
            )


def notes_on_predictions(counts: Iterable[tuple[str, int]], images: int) -> Iterator[str]:
    """Notes on missing predictions, from (name of the attack, samples without one) and the number of all images."""
    for name, count in counts:
        if count:
            yield f"no prediction for {count} of {images} images under {name}, counted as wrong: {SILENT}"


def notes_on_reach(adversary: Adversary, reach: Reach) -> Iterator[str]:
    """Notes on images that an attack of another library returned beyond the box or its budget."""
    if reach.nonfinite:
        yield (
            f"{reach.nonfinite} of the images that {adversary.title} returned are not finite: they get no prediction "
            "and are counted as wrong"
        )
    if reach.leaves_box():
        yield (
            f"the images that {adversary.title} returned go from {reach.low:.6g} to {reach.high:.6g}, beyond [0, 1]: "
            "its robust accuracy is left out"
        )
    if reach.exceeds(adversary.eps, adversary.norm):
        yield (
            f"the images that {adversary.title} returned are up to {reach.linf:.6g} in L-inf and {reach.l2:.6g} in L2 "
            f"from the clean ones, beyond its eps of {adversary.eps:.6g}: its robust accuracy is left out. Does it "
            "take images in [0, 1], and its eps in their unit?"
        )


def notes_on_late_falls(trials: Iterable[Trial]) -> Iterator[str]:
    """Notes on PMA that found its last samples in the last tenth of a run: there may be more to find."""
    for trial in trials:
        attack, verdicts = trial.adversary.attack, trial.verdicts
        if isinstance(attack, (PMA, PMAL2)) and trial.latest and trial.latest["restart"] > 0:
            last = verdicts.fooled & (verdicts.restart == trial.latest["restart"])
            late = int((last & (verdicts.step > 0.9 * attack.steps)).sum())
            if late:
                yield (
                    f"the last {late} samples that {trial.adversary.title} fooled fell in the last tenth of the run's "
                    f"{attack.steps} steps: longer runs may find more. Evaluate with --attacks pma,pma-100-2"
                )


def notes_on_losses(counts: Iterable[tuple[str, int]]) -> Iterator[str]:
    """Notes on losses, from (name of the attack, losses that were not finite)."""
    for name, count in counts:
        if count:
            yield f"{count} losses under {name} were not finite; no step was taken there"


def notes_on_accuracies(results: Sequence[tuple[str, Attack, torch.Tensor]]) -> Iterator[str]:
    """Notes on a stronger attack that finds less than a weaker one, by more than chance explains.

    Chance lets some samples fall to the weaker attack only, and as many to the stronger one only: the difference of
    the two counts must be more than two of its deviations, the root of their sum (McNemar 1947, Psychometrika 12).
    Where none falls to the stronger one only, that is five samples.

    Args:
        results: (name, attack, which samples withstood it, (N,) bool), each on all samples.
    """
    for name, attack, robust in results:
        for stronger_name, stronger, other in results:
            if _is_stronger(stronger, attack) and _rises(robust, other):
                before, after = (float(each.double().mean()) for each in (robust, other))
                yield (
                    f"robust accuracy rises from {before:.2%} under {name} to {after:.2%} under {stronger_name}, which "
                    "is stronger: the model may hide its gradients, and neither figure is its robustness"
                )


def _rises(robust: torch.Tensor, other: torch.Tensor) -> bool:
    gained, lost = int((other & ~robust).sum()), int((robust & ~other).sum())
    chance: float = 2 * (gained + lost) ** 0.5
    return gained - lost > chance


def _is_stronger(a: Attack, b: Attack) -> bool:
    """More steps, more restarts or a larger eps, and less of nothing, where the two can be compared."""
    kind_a, kind_b = ((x.norm, x.loss, x.targeted, getattr(x, "project", True)) for x in (a, b))
    strength = [(getattr(a, name), getattr(b, name)) for name in ("steps", "restarts", "eps")]
    return kind_a == kind_b and all(x >= y for x, y in strength) and any(x > y for x, y in strength)
