"""The probability-margin attack."""

from collections.abc import Callable

import torch

from fastadv.attacks.engine import Slots
from fastadv.attacks.l2 import PGDL2
from fastadv.attacks.losses import BOTH
from fastadv.attacks.pgd import PGD
from fastadv.attacks.schedules import SCHEDULES


class _TwoStages:
    """The objective and the step sizes, whatever the norm.

    In the first half of its steps a run climbs -p_y, the next run p_m, the best other class's probability; in the
    second half both climb p_m - p_y. In each half the step falls from 2 eps by half a cosine.
    """

    by_age = True

    def check(self) -> None:
        super().check()
        if self.steps % 2:
            raise ValueError(f"steps must be even, for PMA has two halves, got {self.steps}")

    def aim(self, slots: Slots) -> torch.Tensor:
        climbed = torch.where(slots.age < self.steps // 2, slots.restart % 2, BOTH)
        return torch.stack((slots.targets, climbed), 1)

    def factors(self) -> list[float]:
        half = self.steps // 2
        return [SCHEDULES["cosine"](step, half) for step in range(half)] * 2


class PMA(_TwoStages, PGD):
    """The probability-margin attack: Xie et al. 2025 (arXiv 2411.15210).

    Two runs of it find nearly what AutoAttack finds. The gradient is of the same sign as theirs, and does not vanish
    where the model is sure.

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the L-inf ball around the image, in pixels of [0, 1].
        steps: of a run, even. 20 are the default here; the paper's are 100.
        options: see `Attack`; restarts is the number of runs, two unless said otherwise.

    Raises:
        ValueError: eps is not in [0, 1], or steps is odd or below 2.
    """

    def __init__(self, model: Callable, eps: float = 8 / 255, steps: int = 20, *, restarts: int = 2, **options):
        options = {"loss": "probability_margin", **options}
        super().__init__(model, eps, None, steps, True, restarts=restarts, **options)


class PMAL2(_TwoStages, PGDL2):
    """The probability-margin attack on the L2 ball: Xie et al. 2025 (arXiv 2411.15210).

    Args: as PMA's; eps: the L2 norm of a whole perturbation with pixels in [0, 1].
    """

    def __init__(self, model: Callable, eps: float = 0.5, steps: int = 20, *, restarts: int = 2, **options):
        options = {"loss": "probability_margin", **options}
        super().__init__(model, eps, None, steps, True, restarts=restarts, **options)
