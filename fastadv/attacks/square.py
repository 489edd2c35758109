"""The Square attack: a random search that sees the model's outputs only."""

import math
from abc import abstractmethod
from bisect import bisect_left
from typing import Any

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.checks import check_number, check_whole
from fastadv.attacks.engine import Slots
from fastadv.attacks.noise import uniform
from fastadv.attacks.samplewise import put_, seeds_for
from fastadv.attacks.schedules import Factors
from fastadv.functional import fgsm_step, pgd_step
from fastadv.nn.logits import AnyModel

HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000)  # queries
APART = 2**31  # from the seeds of other runs, which are numbered from 0


class RandomSearch(Attack):
    """The Square attack without its norm: each query changes a window of the best point so far."""

    by_gradient = False
    by_age = True
    draws = True

    def __init__(self, model: AnyModel, eps: float, n_queries: int = 5000, p_init: float = 0.8, **options: Any) -> None:
        super().__init__(model, eps, **{"loss": "margin", **options})
        self.n_queries = n_queries
        self.p_init = p_init
        self._sides: dict[tuple[int, int, float], Factors] = {}
        self.check()

    @property
    def steps(self) -> int:
        return self.n_queries

    def check(self) -> None:
        super().check()
        check_whole("n_queries", self.n_queries)
        check_number("p_init", self.p_init)
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init is a share of the image, above 0 and at most 1, got {self.p_init}")

    def check_shape(self, x: torch.Tensor) -> None:
        if x.ndim != 4:
            raise ValueError(
                f"{type(self).__name__} changes squares of pixels: images must be of shape (N, C, H, W), got "
                f"{tuple(x.shape)}"
            )

    @abstractmethod
    def side(self, area: float) -> int:
        """The side of a window that is to have this area."""

    @abstractmethod
    def propose(self, slots: Slots, best: torch.Tensor) -> None:
        """Write the next iterate, from the best so far."""

    @abstractmethod
    def into_ball(self, slots: Slots) -> None:
        """Bring a start that was given into the ball."""

    def prepare(self, slots: Slots) -> None:
        # Before its first step a slot has no best point: that step writes all of these, whatever they hold.
        if not slots.memory:
            n, device = len(slots.x), slots.x.device
            slots.memory["best"] = torch.zeros_like(slots.adv)
            slots.memory["highest"] = torch.zeros(n, dtype=torch.float64, device=device)
            slots.memory["won"] = torch.zeros(n, dtype=torch.bool, device=device)
        if slots.given:
            self.into_ball(slots)

    def step(self, slots: Slots, grad: torch.Tensor | None) -> None:
        self._keep(slots)
        self.propose(slots, slots.memory["best"])

    def _keep(self, slots: Slots) -> None:
        """Keep the iterate where its loss is the highest so far; one that fools is better than any that does not."""
        best, highest, won = (slots.memory[name] for name in ("best", "highest", "won"))
        first = slots.age == 0
        better = slots.losses > highest
        # The margin's sign says whether it fools.
        fooled = None if self.loss == "margin" else self.fooled(slots.logits, slots.targets)
        if fooled is not None:
            won &= ~first
            better = torch.where(won == fooled, better, fooled)
            won |= fooled
        better |= first
        put_(best, better, slots.adv)
        torch.where(better, slots.losses, highest, out=highest)

    def ended(self, slots: Slots) -> torch.Tensor:
        return slots.age >= self.n_queries - 1  # the start is the first query

    def result(self, slots: Slots) -> torch.Tensor:
        return slots.memory["best"]

    def sides(self, slots: Slots) -> tuple[torch.Tensor, torch.Tensor]:
        """The sides of the next windows, float64 (N, 1), and how many rows and columns they leave, (N, 2)."""
        height, width = slots.x.shape[2:]
        made_for = height, width, self.p_init
        if made_for not in self._sides:
            halved = [bisect_left(HALVED_AFTER, query) for query in range(HALVED_AFTER[-1] + 2)]
            sides = {n: min(self.side(self.p_init * 0.5**n * height * width), height, width) for n in set(halved)}
            self._sides[made_for] = Factors([(sides[n], height - sides[n], width - sides[n]) for n in halved])
        sizes, left = self._sides[made_for](slots.age).split((1, 2), 1)
        return sizes, left

    def numbers(self, slots: Slots, count: int) -> torch.Tensor:
        """Uniform in (0, 1), float32 (N, count): others for each query."""
        like = slots.x.new_empty((len(slots.x), count), dtype=torch.float32)
        return uniform(like, seeds_for(slots.seed, slots.x, slots.age + APART))


class Square(RandomSearch):
    """The Square attack on the L-inf ball: Andriushchenko et al. 2020 (arXiv 1912.00049, algorithms 1 and 2).

    It needs no gradient: it starts from vertical stripes of +-eps, and each query moves one random square of the best
    point so far to +eps or -eps in each channel. The square is the smaller the later the query; the schedule is that
    of 10,000 queries, however many there are.

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the L-inf ball around the image, in the images' units, [0, 1].
        n_queries: number of images of a sample that the model sees, with the start. AutoAttack has 5000.
        p_init: share of the image that the first squares have.
        options: see `Attack`. The loss is "margin"; a query is judged by it and by whether it fools.

    A call returns the best point that the model has seen.

    Raises:
        ValueError: eps or p_init is not in [0, 1], n_queries is below 1, or images are not of shape (N, C, H, W).
    """

    def __init__(
        self, model: AnyModel, eps: float = 8 / 255, n_queries: int = 5000, p_init: float = 0.8, **options: Any
    ) -> None:
        super().__init__(model, eps, n_queries, p_init, **options)

    def side(self, area: float) -> int:
        return max(round(math.sqrt(area)), 1)

    def start(self, slots: Slots) -> None:
        n, channels, _, width = slots.x.shape
        stripes = uniform(slots.x.new_empty((n, channels, 1, width), dtype=torch.float32), slots.seed) - 0.5  # never 0
        slots.adv = fgsm_step(
            slots.x, stripes.expand(slots.x.shape), slots.eps, out=slots.adv, **self.model_input_kwargs(slots)
        )

    def into_ball(self, slots: Slots) -> None:
        self._move(slots, slots.adv, torch.zeros_like(slots.adv))

    def propose(self, slots: Slots, best: torch.Tensor) -> None:
        drawn = self.numbers(slots, 2 + slots.x.shape[1])
        sides, left = self.sides(slots)
        rows, columns = window(places(drawn[:, :2], left), sides, slots.x)
        squares = (drawn[:, 2:, None] - 0.5) * rows[:, None]  # (N, C, H); within the window never 0
        torch.mul(squares[..., None], columns[:, None, None], out=slots.adv)
        self._move(slots, best, slots.adv)

    def _move(self, slots: Slots, point: torch.Tensor, directions: torch.Tensor) -> None:
        """Move each pixel to the side of the ball that `directions` has the sign of; 0 leaves it."""
        pgd_step(
            point,
            directions,
            slots.x,
            alpha=2 * slots.eps,
            eps=slots.eps,
            out=slots.adv,
            **self.model_input_kwargs(slots),
        )


def places(drawn: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """The first row and the first column of a window in each image: float64 (N, 2), from `drawn` in (0, 1), (N, 2).

    left: as `RandomSearch.sides` gives it. As in the authors' code none is at the last place where it would fit, unless
    that is the only one.
    """
    return (drawn * left).floor_()


def window(first: torch.Tensor, sides: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 for the rows and for the columns of each image that are in its window, else 0: float32 (N, H), (N, W)."""
    height, width = x.shape[2:]
    along = torch.arange(max(height, width), dtype=first.dtype, device=x.device) - first[..., None]
    inside = ((along >= 0) & (along < sides[..., None])).float()
    return inside[:, 0, :height], inside[:, 1, :width]
