"""The probability-margin attack."""

from collections.abc import Sequence
from typing import Any

import torch

from fastadv.attacks.checks import check_whole
from fastadv.attacks.engine import Slots
from fastadv.attacks.l2 import PGDL2
from fastadv.attacks.losses import BOTH, TO_CLASS
from fastadv.attacks.pgd import PGD
from fastadv.attacks.schedules import SCHEDULES
from fastadv.nn.logits import AnyModel

TOLERANCE = 0.002  # of the images, that a verdict may differ by
PATIENCE = 4  # runs after the first that must together find half of that, for another one to be worth it


class _TwoStages(PGD):
    """The objective and the step sizes, whatever the norm.

    The first two runs are the paper's: in the first half of its steps one climbs -p_y, the other p_m, the best other
    class's probability; in the second half both climb p_m - p_y. In each half the step falls from 2 eps by half a
    cosine. A further run goes in its first quarter to a class of its own, by the margin to it, and then climbs
    p_m - p_y, while the step falls once: the third run goes to the second of the clean image's logits, the fourth to
    the third, and so on. Of what two miss on small networks six such runs leave 26 %, six like the first two 35 %.
    """

    by_age = True
    compares = "pairs"

    def __init__(
        self,
        model: AnyModel,
        eps: float = 8 / 255,
        steps: int = 20,
        *,
        restarts: int = 2,
        most_runs: int = 20,
        **options: Any,
    ) -> None:
        self.most_runs = most_runs
        options = {"loss": "probability_margin", "alpha": None, **options}
        super().__init__(model, eps, steps=steps, restarts=restarts, **options)

    def runs(self, classes: int) -> int:
        return self.restarts

    def check(self) -> None:
        super().check()
        if self.steps % 2:
            raise ValueError(f"steps must be even, for PMA has two halves, got {self.steps}")
        check_whole("most_runs", self.most_runs)
        if self.loss != "probability_margin" or self.schedule != "constant":
            raise ValueError(
                "PMA climbs the loss 'probability_margin' by stages, with step sizes of its own (schedule='constant'), "
                f"got {self.loss!r} and {self.schedule!r}: pass PGD another loss or schedule"
            )

    def aim(self, slots: Slots) -> torch.Tensor:
        run, others = slots.restart, slots.targets[:, 1:]
        own_class = others.gather(1, ((run - 2) % others.shape[1])[:, None])[:, 0]
        climbed = torch.where(run < 2, run, TO_CLASS + own_class)  # LABEL, then OTHER
        both = slots.age >= torch.where(run < 2, self.steps // 2, self.steps // 4)
        return torch.stack((slots.targets[:, 0], torch.where(both, BOTH, climbed)), 1)

    def goes_on(self, falls: Sequence[int], images: int) -> bool:
        if not 2 <= len(falls) < self.most_runs:
            return False
        first, second = falls[:2]
        many = second > max(1, TOLERANCE * images) or second > first / 10  # a run misses more than a tenth
        return many and sum(falls[1:][-PATIENCE:]) > TOLERANCE / 2 * images

    def factors(self) -> list[float]:
        half, whole = ([SCHEDULES["cosine"](k, n) for k in range(n)] for n in (self.steps // 2, self.steps))
        return half + half + whole

    def factor_of(self, slots: Slots) -> torch.Tensor:
        return slots.age + self.steps * (slots.restart >= 2)


class PMA(_TwoStages):
    """The probability-margin attack: Xie et al. 2025 (arXiv 2411.15210).

    On many models two runs of it find what AutoAttack finds. Where the second found more than one image in 500, or a
    tenth of what the first found, an evaluation goes on with others, while the last four, the first apart, found more
    than one image in 1,000.

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the L-inf ball around the image, in the images' units, [0, 1].
        steps: of a run, even. 20 are the default here; the paper's are 100.
        restarts: the number of runs.
        most_runs: up to which an evaluation goes on.
        options: see `Attack`; the loss is "probability_margin".

    Raises:
        ValueError: eps is not in [0, 1], steps is odd or below 2, or there is another loss or schedule.
    """


class PMAL2(_TwoStages, PGDL2):
    """The probability-margin attack on the L2 ball: Xie et al. 2025 (arXiv 2411.15210).

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball, the L2 norm of a whole perturbation with pixels in [0, 1].
        steps: of a run, even.
        options: as PMA's; see `Attack`.

    Raises:
        ValueError: eps is negative, steps is odd or below 2, or there is another loss or schedule.
    """

    def __init__(self, model: AnyModel, eps: float = 0.5, steps: int = 20, **options: Any) -> None:
        super().__init__(model, eps, steps, **options)
