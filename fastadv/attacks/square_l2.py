"""The Square attack on the L2 ball."""

import math
from typing import Any

import torch

from fastadv.attacks.checks import box_of
from fastadv.attacks.engine import Slots
from fastadv.attacks.l2 import OnL2Ball
from fastadv.attacks.noise import uniform
from fastadv.attacks.square import RandomSearch, places, window
from fastadv.functional import to_float
from fastadv.nn.logits import AnyModel

TILES = 5  # of the start, along each axis
TINY = 1e-12


class SquareL2(OnL2Ball, RandomSearch):
    """The Square attack on the L2 ball: Andriushchenko et al. 2020 (arXiv 1912.00049, algorithms 1 and 3).

    It starts from 5 x 5 bumps, and each query takes what one random window of the best perturbation holds, and what
    the box left unused, into a bump in another.

    Args:
        model: any callable from images to logits (N, C).
        eps: radius of the ball, the L2 norm of a whole perturbation with pixels in [0, 1].
        n_queries: as Square's.
        p_init: as Square's.
        options: see `Attack`.

    Raises:
        ValueError: as Square, and for images of fewer than 5 rows or columns.
    """

    def __init__(
        self, model: AnyModel, eps: float = 0.5, n_queries: int = 5000, p_init: float = 0.8, **options: Any
    ) -> None:
        super().__init__(model, eps, n_queries, p_init, **options)
        self._bumps: dict[int, Bumps] = {}

    def check_shape(self, x: torch.Tensor) -> None:
        super().check_shape(x)
        if min(x.shape[2:]) < TILES:
            raise ValueError(
                f"SquareL2 starts from {TILES} x {TILES} tiles: images must have {TILES} rows and columns at least, "
                f"got {tuple(x.shape)}"
            )

    def side(self, area: float) -> int:
        side = max(round(math.sqrt(area)), 3)
        return side + 1 - side % 2

    def bumps(self, x: torch.Tensor) -> "Bumps":
        longest = min(x.shape[2:])
        if longest not in self._bumps:
            self._bumps[longest] = Bumps(longest)
        return self._bumps[longest]

    def start(self, slots: Slots) -> None:
        clean = to_float(slots.x)
        n, channels, height, width = clean.shape
        side = min(height, width) // TILES
        drawn = uniform(clean.new_empty((n, 1 + channels, TILES, TILES), dtype=torch.float32), slots.seed) - 0.5
        drawn = drawn[..., None, None]
        bump = self.bumps(clean).of(side, clean)
        tiles = drawn[:, 1:].sign() * torch.where(drawn[:, :1] > 0, bump, bump.T)  # (N, C, 5, 5, side, side)
        covered = TILES * side
        top, left = (height - covered) // 2, (width - covered) // 2
        delta = torch.zeros_like(clean, dtype=tiles.dtype)
        delta[:, :, top : top + covered, left : left + covered] = tiles.transpose(3, 4).reshape(
            n, channels, covered, covered
        )
        self._write(slots, clean, delta.mul_(1 / math.sqrt(channels * TILES**2)).mul_(slots.eps))

    def propose(self, slots: Slots, best: torch.Tensor) -> None:
        clean, (delta, held, inside, outside, bump) = to_float(slots.x), self._scratch(slots)
        torch.sub(best.to(delta.dtype), clean, out=delta)
        channels = clean.shape[1]
        drawn, (sides, left) = self.numbers(slots, 5 + channels), self.sides(slots)
        first = places(drawn[:, :2], left)
        mask(first, sides, inside)
        mask(places(drawn[:, 2:4], left), sides, outside)
        outside.neg_().add_(1).addcmul_(outside, inside, value=-1)

        # For each channel: what both windows hold, and its share of what the box left unused.
        before = channel_norms(delta).square()
        torch.mul(delta, inside, out=held)
        kept, held_norm = delta.mul_(outside), channel_norms(held)
        unused = slots.eps**2 - before.sum(1, keepdim=True)  # below 0 where rounding errors led out of the ball
        norm = (unused / channels + before - channel_norms(kept).square()).clamp_min(0.0).sqrt()

        self.bumps(clean)(sides[:, 0], drawn[:, 4] > 0.5, first, bump[:, 0])
        signs = (drawn[:, 5:] - 0.5).sign()[..., None, None].to(delta.dtype)
        new = held.addcmul_(signs * torch.where(held_norm > TINY, held_norm, 1.0), bump)  # both are as long
        # The whole is of norm eps then, and there is nothing to rescale.
        adv = kept.addcmul_(new, (norm / (channel_norms(new) + TINY)).to(delta.dtype)).add_(clean)
        self._become(slots, clean, adv.clamp_(*box_of(self.clip)))

    def _scratch(self, slots: Slots) -> list[torch.Tensor]:
        """Memory for two tensors like the images and three of one channel."""
        if "delta" not in slots.scratch:
            like = torch.empty_like(slots.adv, dtype=torch.promote_types(slots.adv.dtype, torch.float32))
            slots.scratch |= {"delta": like, "held": torch.empty_like(like)}
            slots.scratch |= {name: torch.empty_like(like[:, :1]) for name in ("inside", "outside", "bump")}
        return [slots.scratch[name] for name in ("delta", "held", "inside", "outside", "bump")]


def mask(first: torch.Tensor, sides: torch.Tensor, out: torch.Tensor) -> None:
    """Write 1 in the window, 0 elsewhere: (N, 1, H, W)."""
    rows, columns = (side.to(out.dtype) for side in window(first, sides, out))
    torch.mul(rows[:, None, :, None], columns[:, None, None, :], out=out)


def channel_norms(t: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(t, dim=(2, 3), keepdim=True)
    return norms


class Bumps:
    """A bump is two opposite pyramids, on the two halves of a square, of norm 1.

    A pyramid is a sum of nested rectangles around its middle, the k-th weighted 1 / k^2: at a pixel it is as high as at
    the farther of its two distances, along the two axes. So a bump is made of vectors: at (i, j) of
    weight(i) weight(j) min(height(i), height(j)).

    longest: side of the largest.
    """

    def __init__(self, longest: int) -> None:
        # Of each side, along each axis: heights and weights, and 0 outside.
        self._table = torch.zeros(longest + 1, 2, 2, longest + 2, dtype=torch.float64)
        for side in range(1, longest + 1):
            self._table[side, ..., 1 : side + 1] = profiles(side)

    def __call__(
        self, sides: torch.Tensor, turned: torch.Tensor, first: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """Write one in each image, of these sides (N,) and with its first pixels at `first` (N, 2): (N, H, W).

        turned: bool (N,), whether its halves are left and right, not above and below.
        """
        if self._table.device != out.device:
            self._table = self._table.to(out.device)
        n, height, width = out.shape
        axis = 2 * sides.long() + turned
        vectors = self._table.flatten(0, 1).index_select(0, torch.cat((axis, axis + 1 - 2 * turned.long())))
        along = torch.arange(1, 1 + max(height, width), dtype=first.dtype, device=out.device)
        at = (along - first.T.reshape(-1, 1)).clamp(0, vectors.shape[2] - 1).long()
        vectors = vectors.to(out.dtype).gather(2, at[:, None].expand(-1, 2, -1))
        down, across = vectors[:n, :, :height, None], vectors[n:, :, None, :width]
        return torch.minimum(down[:, 0], across[:, 0], out=out).mul_(down[:, 1]).mul_(across[:, 1])

    def of(self, side: int, like: torch.Tensor) -> torch.Tensor:
        """One with its halves above and below each other: (side, side)."""
        split: torch.Tensor
        split, whole = self._table[side, ..., 1 : side + 1].to(
            like.device, torch.promote_types(like.dtype, torch.float32)
        )
        return torch.minimum(split[0, :, None], whole[0]) * split[1, :, None]


def profiles(side: int) -> torch.Tensor:
    """Heights and weights of a bump along the axis that its halves split and along the other: (2, 2, side)."""
    along, half = torch.arange(side), side // 2
    below = along >= half
    sums = torch.arange(1, half + 2, dtype=torch.float64).pow(-2).cumsum(0)
    heights = sums[-1] - torch.cat((torch.zeros_like(sums[:1]), sums))
    split = heights[(along - torch.where(below, half + (side - half) // 2, half // 2)).abs()]
    whole = heights[(along - half).abs()]
    energy = torch.minimum(split[:, None], whole).square().sum(1)
    halves = 2 if half else 1  # a single pixel has but one
    norms = torch.where(below, -energy[below].sum().sqrt(), energy[~below].sum().sqrt()) * math.sqrt(halves)
    return torch.stack((torch.stack((split, 1 / norms)), torch.stack((whole, torch.ones_like(whole)))))
