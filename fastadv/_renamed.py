"""Old public names, which work until the next minor release and warn."""

import importlib
import warnings
from collections.abc import Callable, Mapping


def old_names(module: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """`__getattr__` of the module called `module`, with `names` from an old name to the new one, "package.name"."""

    def getattr_(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = names[name].rpartition(".")
        warnings.warn(f"{module}.{name} is now {names[name]}", FutureWarning, stacklevel=2)
        return getattr(importlib.import_module(place), new)

    return getattr_
