"""What attacks find together: which samples one hands on to the next, and what all of them leave."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from fastadv.evaluation.adversaries import Adversary
from fastadv.evaluation.foreign import Reach
from fastadv.evaluation.images import Gallery, Kept
from fastadv.evaluation.queue import Verdicts


@dataclass
class Trial:
    """An adversary and how far it is."""

    adversary: Adversary
    verdicts: Verdicts
    gallery: Gallery | Kept | None
    reach: Reach | None  # of an attack that is called batch by batch
    seconds: float = 0.0
    zeros: tuple[int, int] | None = None  # samples whose first gradient is 0, and samples looked at
    by_square: torch.Tensor | None = None  # which of the survivors fell to some queries without gradients, (N,) bool

    @property
    def within_budget(self) -> bool:
        """Whether all that it found lies in a ball of a known norm and radius, and in the box."""
        adversary, reach = self.adversary, self.reach
        if not adversary.has_budget:
            return False
        return reach is None or not (reach.leaves_box() or reach.exceeds(adversary.eps, adversary.norm))

    def is_open(self, images: int) -> bool:
        """Whether there is anything left to run; an attack may ask for another run of itself."""
        verdicts, attack = self.verdicts, self.adversary.attack
        left = bool((verdicts.todo & ~verdicts.fooled).any()) and not verdicts.unsettled.any()
        if left and self.adversary.ours and attack.goes_on(verdicts.falls, images):
            verdicts.restarts += 1
            if self.gallery is not None:  # another image of each will be the last one
                self.gallery.again(verdicts.unsettled)
        return bool(verdicts.unsettled.any())

    def falls_at(self, norm: str, eps: float) -> bool:
        """Whether a sample that it fooled is fooled at that budget too: its own ball lies in that one."""
        return self.within_budget and self.adversary.norm == norm and self.adversary.eps <= eps

    @property
    def zero_gradients(self) -> float | None:
        """The share of those looked at whose first gradient is 0; None where none was."""
        return self.zeros[0] / self.zeros[1] if self.zeros and self.zeros[1] else None

    @property
    def latest(self) -> dict[str, int] | None:
        """{"restart", "step"} of the sample that fell last; None where none did."""
        fooled = self.verdicts.fooled
        if not fooled.any():
            return None
        restart = int(self.verdicts.restart[fooled].max())
        return {"restart": restart, "step": int(self.verdicts.step[fooled & (self.verdicts.restart == restart)].max())}


def in_turn(trials: Sequence[Trial]) -> list[Trial]:
    """The order in which they run: as given, but of one attack's budgets the smallest first."""
    blocks, numbered = -1, []
    for i, trial in enumerate(trials):
        blocks += i == 0 or trial.adversary.name != trials[i - 1].adversary.name
        numbered.append((blocks, trial.adversary.eps or 0.0, i, trial))
    return [each[-1] for each in sorted(numbered, key=lambda each: each[:3])]


def fooled_by(trials: Sequence[Trial], norm: str | None, eps: float | None, count: torch.Tensor) -> torch.Tensor:
    """Which samples any of `trials` fooled within that budget, (N,) bool, like `count`."""
    fooled = torch.zeros_like(count)
    for trial in trials:
        if norm is not None and eps is not None and trial.falls_at(norm, eps):
            fooled |= trial.verdicts.fooled
    return fooled


def budgets(trials: Sequence[Trial], correct: torch.Tensor) -> Iterator[tuple[str, float, list[str], torch.Tensor]]:
    """(norm, eps, names of the attacks that count there, which samples none of them fools) of every budget."""
    within = [trial for trial in trials if trial.within_budget]
    for norm, eps in dict.fromkeys((trial.adversary.norm, trial.adversary.eps) for trial in within):
        counted = [trial for trial in within if trial.falls_at(norm, eps)]
        robust = correct & ~fooled_by(counted, norm, eps, correct)
        for trial in counted:
            # Counted here and not handed on: at the next budget such samples must show again that gradients are masked.
            robust &= ~trial.by_square if trial.by_square is not None else True
        yield norm, eps, list(dict.fromkeys(trial.adversary.name for trial in counted)), robust


def curve(norm: str, points: Sequence[tuple[float, float]], clean: float) -> dict:
    """Robust accuracy over the budget, from (eps, robust accuracy) in any order, and 0 with the clean accuracy.

    "area" is that under the curve by trapezia, divided by the largest eps: the mean robust accuracy over budgets up to
    it. "expected_robustness" is the mean over all samples of the largest of these budgets that they withstand, in the
    unit of eps: the largest that all budgets beyond it would have to be tried for is not known, so it is a lower bound.
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
