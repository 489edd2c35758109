"""Training attacks by name: they cost less than PGD, and have an update of their own."""

from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import nn

from fastadv.names import instead
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
"""Training attacks by name."""


def fast_method(
    name: str, model: nn.Module, eps: float, changes: Mapping[str, float | None], **options: Any
) -> FastMethod:
    """The training attack called `name`.

    Args:
        name: a key of FAST.
        model: from images in [0, 1] to logits.
        eps: the radius of the ball, in the images' units, [0, 1].
        changes: {setting of the attack: value}; None leaves the attack's own value.
        options: options of the attack whose loss it increases, such as autocast, memory_format and compile.

    Raises:
        TypeError: a value is of a wrong type.
        ValueError: there is no such training attack; it has no such setting; or a value is out of range.
    """
    if name not in FAST:
        raise ValueError(f"unknown training attack {name!r}{instead(name, FAST)}")
    method = FAST[name]
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    for key in given:
        if key not in method.OPTIONS:
            raise ValueError(f"the attack {name} has no setting {key!r}{instead(key, method.OPTIONS)}")
    return method(model, eps, **given, **options)


def is_fast(attack: object) -> TypeGuard[str]:
    """Whether `attack` is a key of FAST."""
    return isinstance(attack, str) and attack in FAST


__all__ = ["FAST", "FastMethod", "fast_method", "is_fast"]
