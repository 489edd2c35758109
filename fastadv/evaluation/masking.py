"""Signs that a model hides its gradients: then no figure of an attack by gradients is its robustness.

Athalye et al. 2018 (arXiv 1802.00420, section 3.1): an attack without gradients finds more, and so does chance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fastadv.attacks import PMA, PMAL2, Attack, Square, SquareL2
from fastadv.evaluation.ensemble import Trial

QUERIES, ASKED = 100, 32  # of the attack without gradients, on so many survivors
ALLOWED = 1  # of them may fall
SURPRISE = 0.002  # of all images that Square may find after attacks by gradients
SHARE = 0.02  # of all images that may fall to the random start alone, or be without a gradient
PART = 0.25  # of what fell at all that may: a model that is merely weak falls to noise as well, but more to gradients
FEW = 5  # so many images by chance are no accident
SQUARES: dict[type[Attack], type[Square] | type[SquareL2]] = {PMA: Square, PMAL2: SquareL2}
OF_THE_MODEL = ("eot", "autocast", "memory_format", "compile", "graph")  # options under which it is judged


@dataclass
class Masking:
    """What the Square attack and chance found after an attack by gradients.

    Attributes:
        images: number of images of the evaluation.
        asked: survivors that the Square attack ran on.
        fell: those of them that it fooled.
        fooled: images that the attacks fooled so far.
        by_chance: those of them that fell to the random start alone.
        without_gradient: share of the images looked at whose gradient is exactly 0.
    """

    images: int
    asked: int
    fell: int
    fooled: int
    by_chance: int
    without_gradient: float

    @property
    def is_likely(self) -> bool:
        """Whether gradients look masked."""
        allowed = max(SHARE * self.images, PART * self.fooled, FEW - 1)
        return self.fell > ALLOWED or self.by_chance > allowed or self.without_gradient > SHARE


def square_of(trial: Trial, shape: tuple[int, ...]) -> Square | SquareL2 | None:
    """The attack without gradients to run after `trial`, where that is PMA on images (N, C, H, W)."""
    attack = trial.adversary.ours
    kind = next((square for pma, square in SQUARES.items() if isinstance(attack, pma)), None)
    if attack is None or kind is None or len(shape) != 4 or (kind is SquareL2 and min(shape[2:]) < 5):
        return None
    return kind(attack.model, attack.eps, QUERIES, **{name: getattr(attack, name) for name in OF_THE_MODEL})


def most_likely(survivors: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The survivors whose clean images are nearest to another class, by the margin of their two best logits.

    Args:
        survivors: which samples withstood, (N,) bool.
        logits: of the clean images, (N, C).

    Returns:
        Numbers of samples, int64, ASKED at most.
    """
    rows = survivors.nonzero()[:, 0]
    best, second = logits[rows].topk(2, dim=1).values.unbind(1)
    return rows[(best - second).argsort(stable=True)[:ASKED]]


def notes_on_square(trials: Sequence[Trial], images: int) -> Iterator[str]:
    """Notes on Square attacks that found more than a few samples which the attacks before them had left.

    Args:
        trials: in the order in which they ran.
        images: number of images of the evaluation.
    """
    for i, trial in enumerate(trials):
        found = int(trial.verdicts.fooled.sum())
        before = [t.adversary.title for t in trials[:i] if t.adversary.eps == trial.adversary.eps and not _is_square(t)]
        if _is_square(trial) and before and found > max(ALLOWED, SURPRISE * images):
            yield (
                f"gradients look masked: {trial.adversary.title}, which needs none, fooled {found} samples that "
                f"{', '.join(before)} had left. The figure may still be too high: give Square more queries and "
                "restarts, or make an attack for this model"
            )


def _is_square(trial: Trial) -> bool:
    return isinstance(trial.adversary.attack, (Square, SquareL2))


def by_chance(trials: Sequence[Trial]) -> int:
    """Samples that any of `trials` fooled by a random start alone."""
    ours = [(trial.adversary.ours, trial.verdicts) for trial in trials if trial.adversary.ours is not None]
    fell = [v.fooled & (v.step == 0) for attack, v in ours if attack.draws and attack.by_gradient]
    return int(torch.stack(fell).any(0).sum()) if fell else 0


def notes_on_masking(found: Sequence[tuple[str, Masking]]) -> Iterator[str]:
    """Notes on masked gradients, from (name of the attack by gradients, what was found after it)."""
    for name, masking in found:
        if masking.is_likely:
            yield (
                f"gradients look masked under {name}: {masking.fell} of {masking.asked} survivors fell to {QUERIES} "
                f"queries of the Square attack, {masking.by_chance} of {masking.images} images to the random start "
                f"alone, and {masking.without_gradient:.1%} have no gradient. Its figure may be far too high: run "
                "--attacks autoattack"
            )
