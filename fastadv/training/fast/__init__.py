"""Fast methods of adversarial training by name."""

from torch import nn

from fastadv.training.fast.base import FastMethod
from fastadv.training.fast.cached import Cached
from fastadv.training.fast.free import Free
from fastadv.training.fast.gradalign import GradAlign
from fastadv.training.fast.liet import LIET
from fastadv.training.fast.pgi import FGSMPGI
from fastadv.training.fast.sora import SORA
from fastadv.training.fast.stale import Stale

FAST: dict[str, type[FastMethod]] = {
    "cached": Cached,
    "fgsm-pgi": FGSMPGI,
    "gradalign": GradAlign,
    "free": Free,
    "liet": LIET,
    "sora": SORA,
    "stale": Stale,
}
"""Fast methods by name."""


def fast_method(
    name: str, model: nn.Module, eps: float, changes: dict[str, float | None], **options: object
) -> FastMethod:
    """The method called `name` (a key of FAST), with `changes` to its settings; of None its own.

    Raises:
        ValueError: it has no such setting.
    """
    method, changes = FAST[name], {key: value for key, value in changes.items() if value is not None}
    for key in changes:
        if key not in method.OPTIONS:
            raise ValueError(f"the attack {name} has no setting {key!r}")
    return method(model, eps, **changes, **options)


def is_fast(attack: object) -> bool:
    """Whether it is a key of FAST."""
    return isinstance(attack, str) and attack in FAST


__all__ = ["FAST", "FastMethod", "fast_method", "is_fast"]
