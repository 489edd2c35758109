"""What an attack can be made with: the names of its settings."""

import inspect
from functools import lru_cache

from fastadv.attacks.attributes import Attributes


@lru_cache
def assignable(attack: type[Attributes]) -> frozenset[str]:
    """The names that may be assigned to an attack."""
    return frozenset({"model", "eps", "objective", *options_of(attack)})


def options_of(attack: type[Attributes]) -> list[str]:
    """Names of what an attack can be made with beside the model and eps: its own, then those it passes to its bases."""
    kinds = [kind for kind in attack.__mro__ if issubclass(kind, Attributes)]
    parameters = [each for kind in kinds for each in inspect.signature(kind).parameters.values()]
    own = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return [name for name in dict.fromkeys(own) if name not in ("model", "eps")]
