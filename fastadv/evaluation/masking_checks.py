"""Notes on an evaluation whose figures may mislead: mostly on a robust accuracy that may be too high.

Sources: Athalye et al. 2018, "Obfuscated gradients give a false sense of security" (arXiv 1802.00420, section 3.1);
Carlini et al. 2019, "On evaluating adversarial robustness" (arXiv 1902.06705, section 4).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.checks import length_in_l2, too_dark
from fastadv.attacks.pma import PMA, PMAL2
from fastadv.attacks.verdicts import SILENT
from fastadv.evaluation.adversaries import Adversary, is_called
from fastadv.evaluation.ensemble import Trial
from fastadv.evaluation.foreign import Reach
from fastadv.evaluation.images import Logits

CHANGE = 1e-3  # times the largest logit: a change far above rounding, and far below one that alters a verdict
ZERO, FEW = 0.1, 8  # if a tenth of the gradients are zero, of eight or more, that is no accident

ENOUGH = 32  # images whose clean accuracy tells a model from a guess


def notes_on_outputs(
    logits: Logits, images: torch.Tensor, draws: int, autocast: torch.dtype | None = None
) -> Iterator[str]:
    """Notes on the model's outputs for one batch: are they the same the second time, and with others beside them?

    Args:
        logits: the model, one draw of it.
        images: the batch, (N, ...).
        draws: the smallest number of draws of the model for each image in an attack.
        autocast: the dtype of torch.autocast for the model; None means without autocast.
    """
    change = CHANGE if autocast is None else 4 * torch.finfo(autocast).eps
    outputs = logits(images)
    # Some models give an impossible class the logit -inf: it says nothing of the scale, and -inf equals -inf.
    allowed = change * outputs.nan_to_num(0.0, 0.0, 0.0).abs().max()
    if ((logits(images) - outputs).abs() > allowed).any():
        if draws == 1:
            yield (
                "the model's output is random: two calls with the same images differ, and gradients look masked. An "
                "attack then needs the gradient of many draws (eot=), and the verdicts hold for one draw"
            )
    elif ((logits(images[(company := _company(len(images)))]) - outputs[company]).abs() > allowed).any():
        yield (
            "the model's output for an image depends on the others in its batch, and the queue mixes batches: is "
            "batch-norm using the batch's statistics?"
        )


def _company(count: int) -> torch.Tensor:
    """The rows of a batch of the same size in which the images have other neighbours: the first half twice, backwards.

    Statistics of the batch do not change with its order alone, and another size would be compiled anew.
    """
    return (torch.arange(count) % ((count + 1) // 2)).flip(0)


def notes_on_guesses(correct: torch.Tensor, labels: torch.Tensor, images: torch.Tensor) -> Iterator[str]:
    """A note where the model is right no more often than one class for all images would be.

    Args:
        correct: which clean images are classified correctly, (N,) bool.
        labels: int64 (N,).
        images: floats in [0, 1] or uint8, all of them or a share.
    """
    count, right = len(labels), int(correct.sum())
    most = int(labels.bincount().max()) if count else 0
    if count < ENOUGH or right > most or most == count:
        return
    why = too_dark(images) or (
        "if it was trained, are the classes numbered as it numbers them, and is its input as in its training, such as "
        "that of Normalized(model, mean, std)?"
    )
    yield (
        f"the model is right for {right} of {count} clean images, no more than one class for all of them would be "
        f"({most}), so that its robust accuracy means nothing: {why}"
    )


def notes_on_lengths(against: Iterable[Adversary]) -> Iterator[str]:
    """Notes on attacks in L2 whose eps is in another unit, and on attacks that are not projected onto their ball."""
    for adversary in against:
        if adversary.norm == "L2" and (wrong := length_in_l2(adversary.eps)):
            yield f"{adversary.title}: {wrong}"
        if not getattr(adversary.attack, "project", True):
            yield f"{adversary.title} is not projected onto its ball, and leaves it: it counts for no budget"


def notes_on_steps(against: Iterable[Adversary], dtype: torch.dtype) -> Iterator[str]:
    """Notes on attacks of this package whose steps are too short: all of them for eps, or one for images of `dtype`."""
    for adversary in against:
        attack = adversary.attack
        wrong = (attack.short_of(adversary.eps), attack.lost_in(dtype)) if isinstance(attack, Attack) else ()
        yield from (f"{adversary.title}: {each}" for each in wrong if each)


def notes_on_gradients(trials: Iterable[Trial]) -> Iterator[str]:
    """Notes on attacks that start where no step can follow many of the gradients."""
    for trial in trials:
        still, looked = trial.zeros or (0, 0)
        least = getattr(trial.adversary.attack, "eps_for_division", 0.0)
        if looked >= FEW and still >= ZERO * looked:
            yield (
                f"the gradient is zero for {still} of {looked} images where {trial.adversary.title} starts (NaN counts "
                f"as zero{f', and so does a length of at most {least:g}' if least else ''}): an attack by gradients "
                "cannot find its way. Does the model round, saturate, or take the root of 0?"
            )


def notes_on_shattering(trials: Iterable[Trial]) -> Iterator[str]:
    """A note for each budget at which most gradients do not say how the margin rises."""
    told = set()
    for trial in trials:
        low, looked = trial.shattered or (0, 0)
        if looked >= FEW and low > looked / 2 and trial.adversary.ball not in told:
            told.add(trial.adversary.ball)
            yield (
                f"gradients look masked: a step of a quarter of the eps of {trial.adversary.title} along the margin's "
                f"gradient raises it, for {low} of {looked} images, by less than a tenth of what the gradient "
                "foretells. An attack by gradients cannot find its way: does the model round its images, or add waves "
                "to them? Run --attacks autoattack, or attack it without that part"
            )


def notes_on_predictions(counts: Iterable[tuple[str, int]], images: int) -> Iterator[str]:
    """Notes on samples without a prediction.

    Args:
        counts: (name of the attack, samples without a prediction).
        images: the number of all images.
    """
    for name, count in counts:
        if count:
            yield f"no prediction for {count} of {images} images under {name}, counted as wrong: {SILENT}"


def notes_on_reach(adversary: Adversary, reach: Reach) -> Iterator[str]:
    """Notes on an attack of another library whose images leave [0, 1] or its budget, or are not finite."""
    if reach.nonfinite:
        yield (
            f"{reach.nonfinite} of the images that {adversary.title} returned are not finite: they get no prediction "
            "and are counted as wrong"
        )
    if reach.looked and not reach.nonfinite and reach.linf == 0 and adversary.eps != 0:
        yield (
            f"nothing was attacked: {adversary.title} returned every image as it was, and its robust accuracy says "
            "nothing of robustness"
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


def notes_on_models(against: Iterable[Adversary]) -> Iterator[str]:
    """Notes on attacks that were made on another model than the one that is judged; an equal copy is none."""
    found: dict[str, list[str]] = {}
    unknown = []
    for adversary in against:
        if adversary.elsewhere is not None:
            found.setdefault(adversary.elsewhere, []).append(adversary.title)
        elif isinstance(adversary.attack, Attack) and adversary.ours is None and not is_called(adversary.attack):
            unknown.append(adversary.title)
    if unknown:
        yield (
            f"{', '.join(unknown)} was made on another object than the model that is judged, and nothing tells that "
            "both compute the same: its last images alone are judged, and masked gradients are not looked for. Make "
            "the attack on the model that is judged"
        )
    for what, titles in found.items():
        yield (
            f"{', '.join(titles)} attacked {what}, not the model that is judged: the images were transferred, and the "
            "robust accuracy is an upper bound. Make the attack on the model that is judged"
        )


def notes_on_late_falls(trials: Iterable[Trial]) -> Iterator[str]:
    """Notes on PMA where samples still fell in the last tenth of a run's steps: more steps may fool more."""
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
    """Notes on losses that were not finite.

    Args:
        counts: (name of the attack, the number of such losses).
    """
    for name, count in counts:
        if count:
            yield f"{count} losses under {name} were not finite; no step was taken there"


def notes_on_accuracies(results: Sequence[tuple[str, Attack, torch.Tensor]]) -> Iterator[str]:
    """Notes on a stronger attack that fooled fewer samples than a weaker one, by more than chance explains.

    By chance some samples fall only to the weaker attack, and about as many only to the stronger one. A note needs the
    first count to exceed the second by more than two standard deviations of the difference, which is the square root of
    the sum of both counts (McNemar 1947, Psychometrika 12). With none in the second count that takes five samples.

    Args:
        results: (name, attack, which samples it did not fool, (N,) bool), for attacks on all samples.
    """
    for name, attack, robust in results:
        for stronger_name, stronger, other in results:
            if _is_stronger(stronger, attack) and _rises(robust, other):
                before, after = (float(each.double().mean()) for each in (robust, other))
                yield (
                    f"robust accuracy rises from {before:.2%} under {name} to {after:.2%} under {stronger_name}, which "
                    "is stronger: the model may hide its gradients, and neither number is its robustness"
                )


def _rises(robust: torch.Tensor, other: torch.Tensor) -> bool:
    gained, lost = int((other & ~robust).sum()), int((robust & ~other).sum())
    chance: float = 2 * (gained + lost) ** 0.5
    return gained - lost > chance


def _is_stronger(a: Attack, b: Attack) -> bool:
    """Whether two attacks can be compared, and `a` has more steps, restarts or eps than `b`, and less of none."""
    kind_a, kind_b = ((x.norm, x.loss, x.targeted, getattr(x, "project", True)) for x in (a, b))
    strength = [(getattr(a, name), getattr(b, name)) for name in ("steps", "restarts", "eps")]
    return kind_a == kind_b and all(x >= y for x, y in strength) and any(x > y for x, y in strength)
