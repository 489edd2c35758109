"""Old public names, which work until the next minor release and warn."""

import importlib
from collections.abc import Callable, Mapping
from typing import TypeVar

from fastadv._warnings import warn

T = TypeVar("T")


def old_names(module: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """The function `__getattr__` of a module with old names: it finds their new objects, and warns.

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
        warn(f"{module}.{name} is now {names[name]}", FutureWarning)
        return getattr(importlib.import_module(place), new)

    return getattr_


def by_new_names(given: Mapping[str, T], names: Mapping[str, str], tell: bool = True) -> dict[str, T]:
    """Replace old names of keyword arguments by the new ones.

    Args:
        given: {old or new name: value}.
        names: {old name: new name}.
        tell: whether an old name gives a warning.

    Returns:
        {new name: value}.

    Raises:
        TypeError: a value is given under both names.
    """
    for old in given.keys() & names.keys():
        if names[old] in given:
            raise TypeError(f"{old} is now {names[old]}, and both are given: leave {old} out")
        if tell:
            warn(f"{old} is now {names[old]}", FutureWarning)
    return {names.get(name, name): value for name, value in given.items()}
