"""Looks for masked gradients: then a gradient attack finds less than there is, and its figure is not the robustness.

The signs are those of Athalye et al. 2018 (arXiv 1802.00420, section 3.1): an attack without gradients, or a random
start alone, fools images that no attack had fooled a gradient attack.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastadv.attacks import PMA, PMAL2, Attack, Square, SquareL2
from fastadv.attacks.checks import box_of
from fastadv.attacks.l2 import gradient_norm
from fastadv.attacks.objective import Objective
from fastadv.attacks.samplewise import per_sample
from fastadv.evaluation.ensemble import Trial
from fastadv.nn.logits import AnyModel

QUERIES, ASKED = 100, 32  # the attack without gradients has 100 queries on each of 32 survivors at most
ALLOWED = 1  # so many of these survivors may fall
SURPRISE = 0.002  # Square may find this share of all images after gradient attacks
# Some images may fall to the random start alone: the largest of this share of all images (so many may also have no
# gradient), ...
SHARE = 0.02
# ... this share of the fooled images (a weak model falls to noise too, but to gradients more), ...
PART = 0.25
FEW = 5  # ... and one image less than these five.
SQUARES: dict[type[Attack], type[Square] | type[SquareL2]] = {PMA: Square, PMAL2: SquareL2}
# Along a step of this part of eps ...
PART_OF_EPS = 1 / 4
# ... a margin should rise by at least this share of what its gradient foretells. The median of 64 images was 0.6 to 1.1
# at eps up to 16/255 for networks trained plainly, robustly or until they collapsed, 0.4 for plain ones at 32/255, 0.3
# where images are rounded to 16 levels and the gradient passes, and below 0.07 behind x + 0.01 sin(10,000 x).
RISE = 0.1
# What is foretold must be more than rounding: this often the dtype's resolution of the larger logit.
ROUNDING = 1000
OF_THE_MODEL = ("eot", "autocast", "memory_format", "compile", "graph")  # options that say how the model is run


@dataclass
class Masking:
    """The signs of masked gradients after a gradient attack, as numbers of images.

    Attributes:
        images: all images of the evaluation.
        asked: the survivors on which the Square attack ran.
        fell: the survivors that the Square attack fooled.
        fooled: the images that the attacks have fooled so far.
        by_chance: the fooled images that fell to the random start alone.
        without_gradient: the share of the checked images whose gradient is exactly 0.
    """

    images: int
    asked: int
    fell: int
    fooled: int
    by_chance: int
    without_gradient: float

    @property
    def is_likely(self) -> bool:
        """Whether the gradients are probably masked."""
        allowed = max(SHARE * self.images, PART * self.fooled, FEW - 1)
        return self.fell > ALLOWED or self.by_chance > allowed or self.without_gradient > SHARE


def square_of(trial: Trial, shape: tuple[int, ...]) -> Square | SquareL2 | None:
    """The attack without gradients to run after a trial of PMA; None after other attacks.

    Args:
        trial: the attack that has run, with its verdicts.
        shape: (N, ...) of the images; the attack takes them as `as_picture` has them. None is returned too where these
            are too small.
    """
    attack, picture = trial.adversary.ours, as_picture(shape[1:])
    kind = next((square for pma, square in SQUARES.items() if isinstance(attack, pma)), None)
    if attack is None or kind is None or (kind is SquareL2 and min(picture[1:]) < 5):
        return None
    model: AnyModel = attack.model
    if picture != shape[1:]:
        model = partial(_of_pictures, model, shape[1:])
    return kind(model, attack.eps, QUERIES, **{name: getattr(attack, name) for name in OF_THE_MODEL})


def as_picture(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of one sample: an image's own, of other inputs one channel that is as square as their size allows."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    size = math.prod(shape)
    height = next(side for side in range(math.isqrt(size), 0, -1) if size % side == 0)
    return 1, height, size // height


def _of_pictures(model: AnyModel, shape: tuple[int, ...], pictures: torch.Tensor) -> Any:
    return model(pictures.reshape(-1, *shape))


def shattered(
    attack: Attack, model: Objective, x: torch.Tensor, pairs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether gradients say how the margin rises a short way along them.

    A step of a quarter of the attack's eps goes along the margin's own gradient. Before any network x + 0.01 sin(10,000
    x) hides it from attacks by gradients, which say nothing of what is beyond the next wave.

    Args:
        attack: with its eps, norm and box.
        model: the model, with the loss "targeted_margin".
        x: images (N, ...), floats.
        pairs: int64 (N, 2), label and another class.

    Returns:
        (which samples' margins hardly rise, (N,) bool; which could be looked at, (N,) bool).
    """
    grad, before, logits = model.gradient(x, pairs)
    resolution = torch.finfo(model.autocast or x.dtype).eps
    assert logits is not None
    least = ROUNDING * resolution * logits.gather(1, pairs).abs().amax(1)
    direction = grad / per_sample(gradient_norm(grad), grad) if attack.norm == "L2" else grad.sign()
    moved = (x + PART_OF_EPS * attack.eps * direction).clamp(*box_of(attack.clip))
    foretold = (grad * (moved - x)).flatten(1).sum(1)
    after, _ = model.judge(moved, pairs)
    looked = foretold > least
    return looked & (after - before < RISE * foretold), looked


def most_likely(survivors: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The survivors that are most likely to fall: those with the smallest margin between their two largest logits.

    Args:
        survivors: (N,) bool, which samples no attack has fooled so far.
        logits: (N, C), the logits of the clean images.

    Returns:
        The numbers of at most ASKED samples, int64, the smallest margin first.
    """
    rows = survivors.nonzero()[:, 0]
    best, second = logits[rows].topk(2, dim=1).values.unbind(1)
    return rows[(best - second).argsort(stable=True)[:ASKED]]


def notes_on_square(trials: Sequence[Trial], images: int) -> Iterator[str]:
    """A note on each Square attack that fooled more than a few samples after other attacks had failed on them.

    Args:
        trials: the attacks with their verdicts, in the order in which they ran.
        images: the number of images of the evaluation.
    """
    for i, trial in enumerate(trials):
        found = int(trial.verdicts.fooled.sum())
        before = [t.adversary.title for t in trials[:i] if t.adversary.eps == trial.adversary.eps and not _is_square(t)]
        if _is_square(trial) and before and found > max(ALLOWED, SURPRISE * images):
            yield (
                f"gradients look masked: {trial.adversary.title}, which needs none, fooled {found} samples that "
                f"survived {', '.join(before)}. The robust accuracy may still be too high: give Square more "
                "queries and restarts, or make an attack for this model"
            )


def _is_square(trial: Trial) -> bool:
    return isinstance(trial.adversary.attack, (Square, SquareL2))


def by_chance(trials: Sequence[Trial]) -> int:
    """The number of samples that an attack fooled by its random start alone.

    Args:
        trials: the attacks with their verdicts; only gradient attacks of this package with a random start count.
    """
    ours = [(trial.adversary.ours, trial.verdicts) for trial in trials if trial.adversary.ours is not None]
    fell = [v.fooled & (v.step == 0) for attack, v in ours if attack.draws and attack.by_gradient]
    return int(torch.stack(fell).any(0).sum()) if fell else 0


def notes_on_masking(found: Sequence[tuple[str, Masking]]) -> Iterator[str]:
    """A note on each gradient attack after which gradients look masked.

    Args:
        found: (name of the gradient attack, the signs after it).
    """
    for name, masking in found:
        if masking.is_likely:
            yield (
                f"gradients look masked under {name}: {masking.fell} of {masking.asked} survivors fell to {QUERIES} "
                f"queries of the Square attack, {masking.by_chance} of {masking.images} images to the random start "
                f"alone, and {masking.without_gradient:.1%} have no gradient. The robust accuracy may be far too "
                "high: run --attacks autoattack"
            )
