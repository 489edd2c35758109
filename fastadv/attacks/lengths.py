"""The lengths of an attack: its budget, its steps, and whether they fit the images and each other."""

import math
from numbers import Real
from typing import Any

from fastadv._warnings import warn
from fastadv.attacks.attributes import Attributes
from fastadv.attacks.checks import box_of
from fastadv.attacks.options import options_of
from fastadv.attacks.samplewise import has_rows

LEAST = 2550  # of it an eps in the images' own unit fills the box: a tenth of what a byte tells apart
ROUNDING = 1e-6  # of a sum of steps: ten of eps / 10 are eps


class Lengths(Attributes):
    """The part of an attack that warns of lengths which cannot be meant, and shows them."""

    def short_of(self, eps: object) -> str | None:
        """Say that all steps together are shorter than eps; None where they are not, or where nobody can tell.

        Args:
            eps: the budget; a tensor, of each image, is not looked at.
        """
        alpha = self.alpha
        if not (isinstance(eps, Real) and isinstance(alpha, Real) and alpha > 0):  # 0 is meant: the start alone
            return None
        reach = float(alpha) * sum(self.factors())
        if reach >= float(eps) * (1 - ROUNDING):
            return None
        alpha, reach, budget = (self._shown("alpha", length) for length in (alpha, reach, eps))
        larger = "eps / 4 with 10 steps, or more steps" if "steps" in options_of(type(self)) else "1.25 eps"
        return (
            f"steps = {self.steps} of alpha = {alpha} move an image by {reach} at most, less than eps = {budget}: from "
            f"the image itself they do not reach the boundary of the ball. Pass a larger alpha, such as {larger}"
        )

    def _warn_of_unit(self) -> None:
        """Warn of an eps in another unit than the images, such as the default one; called by the constructor."""
        lo, hi = box_of(self.clip)
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
        self._warn_of_short(self.eps)

    def _warn_of_short(self, eps: Any) -> None:
        short = self.short_of(eps)
        if short and (share := f"{self.alpha / eps:.4g}") not in self._told:  # a schedule that scales both keeps it
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
