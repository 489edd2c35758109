"""The probability-margin attack."""

from collections.abc import Callable, Sequence

import torch

from fastadv.attacks.checks import check_whole
from fastadv.attacks.engine import Slots
from fastadv.attacks.l2 import PGDL2
from fastadv.attacks.losses import BOTH, TO_CLASS
from fastadv.attacks.pgd import PGD
from fastadv.attacks.schedules import SCHEDULES

LEAST_FALLS = 0.002  # of the images: what a second run must find for further ones to be worth it
PATIENCE = 4  # runs in a row that find nothing


class _TwoStages:
    """The objective and the step sizes, whatever the norm.

    In the first half of its steps a run climbs -p_y, the next run p_m, the best other class's probability; in the
    second half both climb p_m - p_y. In each half the step falls from 2 eps by half a cosine. Where there are more than
    two runs, every other one goes in its first half to a class of its own, by the margin to it: to the second of the
    clean image's logits, then to the third, and so on.
    """

    by_age = True
    compares = "pairs"

    def __init__(
        self,
        model: Callable,
        eps: float = 8 / 255,
        steps: int = 20,
        *,
        restarts: int = 2,
        most_runs: int = 20,
        **options,
    ):
        self.most_runs = most_runs
        options = {"loss": "probability_margin", **options}
        super().__init__(model, eps, None, steps, True, restarts=restarts, **options)

    def runs(self, classes: int) -> int:
        return self.restarts

    def check(self) -> None:
        super().check()
        if self.steps % 2:
            raise ValueError(f"steps must be even, for PMA has two halves, got {self.steps}")
        check_whole("most_runs", self.most_runs)

    def aim(self, slots: Slots) -> torch.Tensor:
        pair, others = slots.restart // 2, slots.targets[:, 1:]
        driven_to = others.gather(1, ((pair - 1) % others.shape[1])[:, None])[:, 0]
        own_class = (slots.restart % 2 == 0) & (pair > 0)
        alternating = torch.where(pair > 0, pair % 2, slots.restart % 2)
        climbed = torch.where(own_class, TO_CLASS + driven_to, alternating)
        return torch.stack((slots.targets[:, 0], torch.where(slots.age < self.steps // 2, climbed, BOTH)), 1)

    def goes_on(self, falls: Sequence[int], images: int) -> bool:
        runs = len(falls)
        if runs >= self.most_runs or runs < 2:
            return False
        if runs == 2:
            return falls[1] > max(1, LEAST_FALLS * images)
        return runs - 2 < PATIENCE or any(falls[-PATIENCE:])

    def factors(self) -> list[float]:
        half = self.steps // 2
        return [SCHEDULES["cosine"](step, half) for step in range(half)] * 2


class PMA(_TwoStages, PGD):
    """The probability-margin attack: Xie et al. 2025 (arXiv 2411.15210).

    On many models two runs of it find what AutoAttack finds. An evaluation goes on with more where the second found
    more than one image in 500, until four in a row find nothing.

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the L-inf ball around the image, in pixels of [0, 1].
        steps: of a run, even. 20 are the default here; the paper's are 100.
        restarts: the number of runs.
        most_runs: up to which an evaluation goes on.
        options: see `Attack`.

    Raises:
        ValueError: eps is not in [0, 1], or steps is odd or below 2.
    """


class PMAL2(_TwoStages, PGDL2):
    """The probability-margin attack on the L2 ball: Xie et al. 2025 (arXiv 2411.15210).

    Args: as PMA's; eps: the L2 norm of a whole perturbation with pixels in [0, 1].
    """

    def __init__(self, model: Callable, eps: float = 0.5, steps: int = 20, **options):
        super().__init__(model, eps, steps, **options)
