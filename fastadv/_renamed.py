"""Old public names, which work until the next minor release and warn."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def old_names(module: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """Make a module's `__getattr__` that knows old names, and warns of them.

    Args:
        module: the module's name.
        names: from an old name to the new one, "package.name".

    Returns:
        The function to assign to `__getattr__`.
    """

    def getattr_(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = names[name].rpartition(".")
        warnings.warn(f"{module}.{name} is now {names[name]}", FutureWarning, stacklevel=2)
        return getattr(importlib.import_module(place), new)

    return getattr_


def by_new_names(given: Mapping[str, T], names: Mapping[str, str], warn: bool = True) -> dict[str, T]:
    """Give what was passed by name its new names.

    Args:
        given: what was passed, by old or new names.
        names: from an old name to the new one.
        warn: whether an old name is warned of.

    Returns:
        The same values by their new names.

    Raises:
        TypeError: a value is given under both names.
    """
    for old in given.keys() & names.keys():
        if names[old] in given:
            raise TypeError(f"{old} is now {names[old]}, and both are given: leave {old} out")
        if warn:
            warnings.warn(f"{old} is now {names[old]}", FutureWarning, stacklevel=3)
    return {names.get(name, name): value for name, value in given.items()}
