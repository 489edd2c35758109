"""Several attacks together: their order, the samples that they fool within a budget, and the curve over budgets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from fastadv.evaluation.adversaries import Adversary
from fastadv.evaluation.foreign import Reach
from fastadv.evaluation.images import FooledImages, Gallery
from fastadv.evaluation.queue import Verdicts


@dataclass
class Trial:
    """An attack with its results so far.

    Attributes:
        adversary: the attack.
        verdicts: the verdict on each sample.
        gallery: the adversarial images, where they are kept; else None.
        reach: the distances of the images, for an attack that is not of this package; else None.
        seconds: the time that it took so far.
        zeros: (samples whose first gradient no step can follow, samples that were checked); None where none were.
        shattered: (samples whose margin hardly rises along its gradient, samples that were checked); None likewise.
        by_square: (N,) bool, which survivors fell to a few queries of the Square attack; None where it did not run.
    """

    adversary: Adversary
    verdicts: Verdicts
    gallery: Gallery | FooledImages | None
    reach: Reach | None
    seconds: float = 0.0
    zeros: tuple[int, int] | None = None
    shattered: tuple[int, int] | None = None
    by_square: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._planned = self.verdicts.restarts

    @property
    def title(self) -> str:
        """For people, what runs: "pma at 8/255", or "pma at 8/255, extra run 3" of an attack that goes on."""
        runs, attack = self.verdicts.restarts, self.adversary.title
        return attack if runs == self._planned else f"{attack}, extra run {runs} because others still fooled samples"

    @property
    def within_budget(self) -> bool:
        """Whether all its adversarial images are in [0, 1] and in a ball of known norm and radius."""
        adversary, reach = self.adversary, self.reach
        if adversary.ball is None:
            return False
        return reach is None or not (reach.leaves_box() or reach.exceeds(adversary.eps, adversary.norm))

    def is_open(self, images: int) -> bool:
        """Whether there is anything left to run; an attack may ask for another run of itself.

        Args:
            images: their number in the evaluation.
        """
        verdicts, attack = self.verdicts, self.adversary.ours
        left = bool((verdicts.todo & ~verdicts.fooled).any()) and not verdicts.unsettled.any()
        if left and attack is not None and attack.goes_on(verdicts.falls, images):
            verdicts.restarts += 1
            if self.gallery is not None:  # another image of each will be the last one
                self.gallery.again(verdicts.unsettled)
        return bool(verdicts.unsettled.any())

    def falls_at(self, norm: str, eps: float) -> bool:
        """Whether a sample that it fooled is fooled within that budget too, because its own ball is inside that one."""
        ball = self.adversary.ball
        return self.within_budget and ball is not None and ball[0] == norm and ball[1] <= eps

    @property
    def zero_gradients(self) -> float | None:
        """The share of the checked samples whose first gradient no step can follow; None where none was checked."""
        return self.zeros[0] / self.zeros[1] if self.zeros and self.zeros[1] else None

    @property
    def shattered_gradients(self) -> float | None:
        """The share of the checked samples whose margin hardly rises along its gradient; None where none was."""
        return self.shattered[0] / self.shattered[1] if self.shattered and self.shattered[1] else None

    @property
    def latest(self) -> dict[str, int] | None:
        """{"restart", "step"} of the sample that fell last; None where none did."""
        fooled = self.verdicts.fooled
        if not fooled.any():
            return None
        restart = int(self.verdicts.restart[fooled].max())
        return {"restart": restart, "step": int(self.verdicts.step[fooled & (self.verdicts.restart == restart)].max())}


def in_turn(trials: Sequence[Trial]) -> list[Trial]:
    """The order in which the trials run: as given, but the budgets of one attack from the smallest to the largest.

    fgsm at 8/255, fgsm at 2/255 and pgd at 8/255 run as fgsm at 2/255, fgsm at 8/255 and pgd at 8/255.
    """
    blocks, numbered = -1, []
    for i, trial in enumerate(trials):
        blocks += i == 0 or trial.adversary.name != trials[i - 1].adversary.name
        numbered.append((blocks, trial.adversary.eps or 0.0, i, trial))
    return [each[-1] for each in sorted(numbered, key=lambda each: each[:3])]


def fooled_by(trials: Sequence[Trial], ball: tuple[str, float] | None, like: torch.Tensor) -> torch.Tensor:
    """Which samples any of `trials` fooled within the ball (norm, eps), (N,) bool; none where the ball is None."""
    fooled = torch.zeros_like(like)
    for trial in trials:
        if ball is not None and trial.falls_at(*ball):
            fooled |= trial.verdicts.fooled
    return fooled


def budgets(trials: Sequence[Trial], correct: torch.Tensor) -> Iterator[tuple[str, float, list[str], torch.Tensor]]:
    """For every budget: (norm, eps, the names of its attacks, which samples none of them fools)."""
    within = [trial for trial in trials if trial.within_budget]
    for ball in dict.fromkeys(trial.adversary.ball for trial in within if trial.adversary.ball is not None):
        counted = [trial for trial in within if trial.falls_at(*ball)]
        robust = correct & ~fooled_by(counted, ball, correct)
        for trial in counted:
            # Counted here and not handed on: at the next budget such samples must show again that gradients are masked.
            robust &= ~trial.by_square if trial.by_square is not None else True
        yield *ball, list(dict.fromkeys(trial.adversary.name for trial in counted)), robust


def curve(norm: str, points: Sequence[tuple[float, float]], clean: float) -> dict[str, Any]:
    """Robust accuracy over the budget.

    Args:
        norm: "Linf" or "L2".
        points: (eps, robust accuracy), in any order.
        clean: the accuracy at eps 0.

    Returns:
        "norm"; "eps", ascending from 0; "robust_accuracy" at each of them; "area", that under the curve by trapezia,
        divided by the largest eps: the mean robust accuracy over budgets up to it; "expected_robustness", the mean over
        all samples of the largest of these budgets at which they are not fooled, in the unit of eps. That is a lower
        bound: a sample that is fooled at 8/255 and not at 4/255 counts as 4/255, wherever between them it falls.
    """
    points = sorted({0.0: clean, **dict(points)}.items())
    steps = list(pairwise(points))
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in steps)
    return {
        "norm": norm,
        "eps": [eps for eps, _ in points],
        "robust_accuracy": [share for _, share in points],
        "area": area / points[-1][0] if points[-1][0] > 0 else clean,
        "expected_robustness": sum((b[0] - a[0]) * b[1] for a, b in steps),
    }
