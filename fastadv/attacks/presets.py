"""Attacks by name, with the settings of their papers."""

from collections.abc import Callable
from typing import Any

from fastadv.attacks.apgd import APGD
from fastadv.attacks.base import Attack
from fastadv.attacks.checks import check_number
from fastadv.attacks.fab import FAB
from fastadv.attacks.fgsm import FGSM, NFGSM
from fastadv.attacks.l2 import PGDL2
from fastadv.attacks.options import options_of
from fastadv.attacks.pgd import BIM, MIFGSM, PGD, TPGD
from fastadv.attacks.pma import PMA, PMAL2
from fastadv.attacks.square import Square
from fastadv.attacks.zerograd import ZeroGrad
from fastadv.names import instead
from fastadv.nn.logits import AnyModel

# A step of eps / 4 is the usual 2/255 at the usual budget of 8/255, and follows the budget elsewhere.
PRESETS: dict[str, tuple[type[Attack], Callable[[float], dict[str, Any]]]] = {
    "fgsm": (FGSM, lambda eps: {}),
    "fgsm-rs": (FGSM, lambda eps: {"alpha": 1.25 * eps, "noise": eps}),
    "nfgsm": (NFGSM, lambda eps: {}),
    "pgd": (PGD, lambda eps: {"alpha": eps / 4, "steps": 7}),
    "pgd-10": (PGD, lambda eps: {"alpha": eps / 4, "steps": 10}),
    "pgd-20": (PGD, lambda eps: {"alpha": eps / 4, "steps": 20}),
    "pgd-50-10": (PGD, lambda eps: {"alpha": eps / 4, "steps": 50, "restarts": 10}),
    "pma": (PMA, lambda eps: {}),
    "pma-l2": (PMAL2, lambda eps: {}),
    "pma-100-2": (PMA, lambda eps: {"steps": 100, "most_runs": 2}),  # as published
    "apgd-ce": (APGD, lambda eps: {}),
    "apgd-dlr": (APGD, lambda eps: {"loss": "dlr"}),
    "apgd-t": (APGD, lambda eps: {"loss": "targeted_dlr", "target_classes": 9}),
    "bim": (BIM, lambda eps: {"alpha": eps / 4, "steps": 10}),
    "mifgsm": (MIFGSM, lambda eps: {"alpha": eps / 10, "steps": 10}),
    "tpgd": (TPGD, lambda eps: {"alpha": 0.007 / 0.031 * eps, "steps": 10}),
    "zerograd": (ZeroGrad, lambda eps: {}),
    "square": (Square, lambda eps: {}),
    "fab": (FAB, lambda eps: {"loss": "margin", "restarts": 5}),
    "fab-t": (FAB, lambda eps: {}),
    "pgdl2": (PGDL2, lambda eps: {"alpha": eps / 5, "steps": 20}),
}
"""Attacks by name: the class, and its settings at a budget. An entry of your own is known by its name everywhere."""


def create_attack(name: str, model: AnyModel, eps: float, **changes: Any) -> Attack:
    """Create an attack by its name, with the settings of its paper.

    Args:
        name: a key of PRESETS, such as "pgd-20".
        model: any callable from images to logits (N, C).
        eps: radius of the ball, in the images' units, [0, 1].
        changes: to its settings (alpha, noise, steps) and to the options of `Attack`. None leaves the preset's value.

    Returns:
        The attack.

    Raises:
        TypeError: eps is no number.
        ValueError: the name is unknown, the attack has no such setting, or eps is not finite.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown attack {name!r}{instead(name, PRESETS)}")
    check_number("eps", eps)
    attack, settings = PRESETS[name]
    changes = {key: value for key, value in changes.items() if value is not None}
    for key in changes:
        if key not in options_of(attack):
            raise ValueError(f"the attack {name} has no setting {key!r}{instead(key, options_of(attack))}")
    return attack(model, eps, **{**settings(eps), **changes})
