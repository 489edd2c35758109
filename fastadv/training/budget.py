"""The schedule of the budget: the share of eps that the training attack has at each step of a run."""

import copy

from fastadv.attacks import Attack
from fastadv.training.foreign import AnyAttack

CONSTANT = "constant"


class Budget:
    """The training attack with a share of its budget, which grows from 0 to 1.

    The share at `step` of `total` is clip((step / total - begin) / (end - begin), 0, 1). It multiplies eps, alpha and
    noise. Where it is 0, the images are not attacked. With hinge:0.25,0.75 and 100 steps:

        step     0   25   50   75   99
        share    0    0  0.5    1    1

    Args:
        attack: the attack with the whole budget.
        schedule: "constant": the whole budget in every step; "linear": from 0 to 1 over all steps;
            "hinge:BEGIN,END": from 0 to 1 between two shares of the steps, such as hinge:0.25,0.75.

    Raises:
        ValueError: there is no such schedule; or it cannot change the attack, which is None or another library's.
    """

    def __init__(self, attack: AnyAttack | None, schedule: str = CONSTANT):
        self.attack, self._span = attack, span(schedule)
        if self._span is None:
            return
        if not isinstance(attack, Attack):
            got = "training on clean images has none" if attack is None else f"{attack!r} has its own budget"
            raise ValueError(f"eps_schedule={schedule!r} changes the budget of an attack of fastadv, and {got}")
        self._scaled = copy.copy(attack)

    def factor(self, step: int, total: int) -> float:
        """The share of the budget, in [0, 1].

        Args:
            step: the number of the step, from 0.
            total: the number of all steps.
        """
        if self._span is None:
            return 1.0
        begin, end = self._span
        return min(max((step / total - begin) / (end - begin), 0.0), 1.0)

    def at(self, step: int, total: int) -> AnyAttack | None:
        """The attack with the budget of a step; None where that is 0. Arguments as of `factor`."""
        factor = self.factor(step, total)
        if factor in (0, 1):
            return self.attack if factor else None
        for name in ("eps", "alpha", "noise"):
            whole = getattr(self.attack, name, None)  # None means that it follows eps
            if whole is not None:
                setattr(self._scaled, name, factor * whole)
        return self._scaled


def span(schedule: str) -> tuple[float, float] | None:
    """The two shares of the steps between which the budget grows, in [0, 1]; None where it is constant.

    Args:
        schedule: as of `Budget`.

    Raises:
        ValueError: there is no such schedule.
    """
    if schedule == CONSTANT:
        return None
    kind, _, numbers = schedule.partition(":")
    try:
        begin, end = (float(n) for n in (numbers.split(",") if kind == "hinge" else (0, 1)))
    except ValueError:
        begin = end = 0.0
    if (kind == "linear" and numbers) or kind not in ("linear", "hinge") or not 0 <= begin < end <= 1:
        raise ValueError(
            f"unknown eps_schedule {schedule!r}: it is constant, linear, or hinge:BEGIN,END, shares of the steps with "
            "0 <= BEGIN < END <= 1, such as hinge:0.25,0.75"
        )
    return begin, end
