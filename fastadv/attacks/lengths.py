"""The lengths of an attack: its budget, its steps, and whether they fit the images and each other."""

import math
from numbers import Real
from typing import Any

import torch

from fastadv._warnings import warn
from fastadv.attacks.attributes import Attributes
from fastadv.attacks.checks import BOX, box_of, length_in_l2
from fastadv.attacks.options import options_of
from fastadv.attacks.samplewise import has_rows

LEAST = 2550  # of it an eps in the images' own unit fills the box: a tenth of what a byte tells apart
ROUNDING = 1e-6  # of a sum of steps: ten of eps / 10 are eps


class Lengths(Attributes):
    """The part of an attack that warns of lengths which cannot be meant, and shows them."""

    def short_of(self, eps: object) -> str | None:
        """Say that all steps together are shorter than eps; None where they are not.

        Args:
            eps: the budget; of tensors, eps or alpha, the image counts whose steps fall shortest of its budget, and to
                read them waits for the device.
        """
        if self.alpha is None:
            return None
        factor = sum(self.factors())
        budget, step = _furthest(eps, self.alpha, factor)
        reach = step * factor
        if step == 0 or reach >= budget * (1 - ROUNDING):  # 0 is meant: the start alone
            return None
        alpha, moved, radius = (self._shown("alpha", length) for length in (step, reach, budget))
        larger = "eps / 4 with 10 steps, or more steps" if "steps" in options_of(type(self)) else "1.25 eps"
        return (
            f"steps = {self.steps} of alpha = {alpha} move an image by {moved} at most, less than eps = {radius}: from "
            f"the image itself they do not reach the boundary of the ball. Pass a larger alpha, such as {larger}"
        )

    def lost_in(self, dtype: torch.dtype) -> str | None:
        """Say that images of this dtype are rounded back to where they were before a step; None where they are not."""
        if dtype not in (torch.float16, torch.bfloat16) or self.norm != "Linf" or box_of(self.clip) != BOX:
            return None
        alpha = self.eps if self.alpha is None else self.alpha
        longest = float(torch.as_tensor(alpha).max()) * max(self.factors())
        apart = torch.finfo(dtype).eps / 2  # just below 1
        if not 0 < longest <= apart / 2:
            return None
        return (
            f"a step of {self._shown('alpha', longest)} is lost to rounding where a pixel is above 0.5: there numbers "
            f"of {dtype} are {apart:.4g} apart. Keep images in float32 or uint8; a model in half precision may convert "
            "them"
        )

    def _warn_of_lengths(self, eps: float | torch.Tensor, dtype: torch.dtype, *, look: bool, given: bool) -> None:
        """Warn of a call's budget and steps that cannot be meant.

        Args:
            eps: the budget, or one for each image.
            dtype: of the images.
            look: whether this is the first call, where tensors are read.
            given: whether the start is given, and may be anywhere in the ball.
        """
        if look and self.norm == "L2":
            wrong = length_in_l2(float(torch.as_tensor(eps).max()), self.clip)
            if wrong:
                warn(wrong)
        known = not isinstance(eps, torch.Tensor) and not isinstance(self.alpha, torch.Tensor)
        if not given and (look or known):
            self._warn_of_short(eps)
        if look and (lost := self.lost_in(dtype)):
            warn(lost)

    def _warn_of_unit(self) -> None:
        """Warn of an eps in another unit than the images, such as the default one; called by the constructor."""
        lo, hi = box_of(self.clip)
        if self.norm == "Linf" and hi - lo < self.eps < math.inf:
            warn(
                f"eps = {self.eps:g} is wider than clip = {self.clip}, and all images are in the ball: pass it in the "
                "images' own unit"
            )
        if self.norm == "Linf" and (lo, hi) != (0, 1) and 0 < LEAST * self.eps < hi - lo < math.inf:
            warn(
                f"eps = {self.eps:g} is tiny on the images' scale, clip = {self.clip}: pass it in their own unit, such "
                "as 8 for [0, 255]"
            )

    def _warn_of_step(self) -> None:
        """Warn of a step size that cannot be meant; called by the constructor that has set all of it."""
        if isinstance(self.alpha, Real) and float(self.alpha) > 2 * self.eps:
            warn(
                f"alpha = {self._shown('alpha', self.alpha)} is more than twice eps = {self._shown('eps', self.eps)}: "
                "a step crosses the ball"
            )
        if not isinstance(self.alpha, torch.Tensor):  # those of each image go with the budgets of a call
            self._warn_of_short(self.eps)

    def _warn_of_short(self, eps: Any) -> None:
        short = self.short_of(eps)
        if not short:
            return
        budget, step = _furthest(eps, self.alpha, sum(self.factors()))
        share = f"{step / budget:.4g}"  # a schedule that scales both keeps it
        if share not in self._told:
            self._told.add(share)
            warn(short)

    def _shown(self, name: str, value: object) -> str:
        if self.norm == "Linf" and name in ("eps", "alpha", "noise") and isinstance(value, float) and 0 < value < 1:
            in_255 = round(value * 255, 6)
            return f"{in_255:g}/255" if abs(in_255 - value * 255) < 1e-9 else f"{value:g}"
        if has_rows(value):
            return f"<one for each of {len(value)}>"
        called: str | None = getattr(value, "__name__", None)
        return called or repr(value)


def _furthest(eps: Any, alpha: Any, factor: float) -> tuple[float, float]:
    """(eps, alpha) of the image for which eps is furthest above alpha times a factor."""
    if not isinstance(eps, torch.Tensor) and not isinstance(alpha, torch.Tensor):
        return float(eps), float(alpha)
    given = (torch.as_tensor(each, dtype=torch.float64).detach().cpu() for each in (eps, alpha))
    rows = (
        each.reshape(1, 1) if each.ndim == 0 else each.flatten(1) if each.ndim > 1 else each[:, None] for each in given
    )
    budgets, steps = torch.broadcast_tensors(*(each.amax(1) for each in rows))
    i = int((budgets - steps * factor).argmax())
    return float(budgets[i]), float(steps[i])
