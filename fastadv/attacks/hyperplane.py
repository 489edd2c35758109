"""The shortest way to a hyperplane that does not leave the pixel box."""

import math

import torch

from fastadv.attacks.samplewise import any_of, largest

# Of Newton's method. All but some of the hardest cases in L2, of normals over many orders of magnitude and planes that
# just touch the box, then have nothing left but rounding errors.
PASSES = 15


def to_hyperplane(
    points: torch.Tensor,
    normal: torch.Tensor,
    gap: torch.Tensor,
    norm: str,
    box: tuple[float, float],
    work: torch.Tensor | None = None,
) -> torch.Tensor:
    """The smallest move of each point onto the hyperplane {u: <normal, u> = b} within the box.

    Where the hyperplane does not meet the box, every pixel goes to the bound that is on its side.

    The move is d_j = clamp(-sign(gap) L c_j, lo - v_j, hi - v_j), with c = sign(normal) in L-inf and c = normal in L2,
    at the level L >= 0 at which sum |normal_j| |d_j| = |gap| (Croce and Hein 2020, arXiv 1907.02044, section 2.2).
    That sum is concave in L, so that Newton's method from L = 0 never goes too far. A fixed number of its passes needs
    no sort of the pixels, and the host waits for nothing.

    Args:
        points: (..., D) floats v, in the box.
        normal: (..., D) finite floats, broadcast to the points. Where all are 0 there is no move.
        gap: (...) <normal, v> - b of each point. Where it is not finite there is no move.
        norm: "Linf" or "L2", in which the move is the smallest.
        box: (lo, hi), which may be infinite.
        work: (3, ..., D), memory for three tensors like the points.

    Returns:
        (..., D) the moves d, in the first part of `work` where that is given.
    """
    # The normal's largest entry becomes 1: no square of it and no sum then leaves the range of its type.
    scale = largest(normal)
    scale = torch.where(scale > 0, scale, 1.0)
    normal = normal / scale[..., None]
    gap = gap.nan_to_num(0.0, 0.0, 0.0) / scale

    direction = normal.sign() if norm == "Linf" else normal
    forward: torch.Tensor
    forward, limit, upper = work if work is not None else points.new_empty(3, *points.shape)
    torch.mul(direction, -gap.sign()[..., None], out=forward)
    # The level at which a pixel comes to its bound: never where it does not move, also if it is there, 0 / 0.
    low, high = (torch.sub(bound, points, out=out) for bound, out in zip(box, (limit, upper), strict=True))
    torch.maximum(low.div_(forward), high.div_(forward), out=limit).nan_to_num_(0.0, math.inf)
    level = _level(normal * direction, limit, gap.abs(), term=upper)
    low, high = (torch.sub(bound, points, out=out) for bound, out in zip(box, (limit, upper), strict=True))
    return forward.mul_(level[..., None]).clamp_(low, high)


def _level(rate: torch.Tensor, limit: torch.Tensor, goal: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """The level L at which sum rate_j min(L, limit_j) is `goal`; beyond all limits where that is too much.

    term: like `limit`, memory to work in.
    """
    level = torch.zeros_like(goal)
    for _ in range(PASSES):
        at = level[..., None]
        reached = torch.minimum(limit, at, out=term).mul_(rate).sum(-1)
        # A comparison that writes 0.0 and 1.0 is five times as fast on the CPU as one that makes a mask.
        slope = torch.gt(limit, at, out=term).mul_(rate).sum(-1)
        further = level + (goal - reached) / slope
        rises = (slope > 0) & (further > level)  # where it does not, all that is left are rounding errors
        if not any_of(rises):
            break
        level = torch.where(rises, further, level).clamp_(max=torch.finfo(goal.dtype).max)
    return level
