"""Imports packages that only some parts of fastadv need."""

import importlib
from types import ModuleType


def require(module: str, extra: str = "train") -> ModuleType:
    """Import a module of a package that an extra of fastadv installs.

    Args:
        module: the name of the module.
        extra: the name of the extra.

    Raises:
        ImportError: the package is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None:  # the package is there, and something else in it is broken
            raise
        raise ImportError(f"{error.name} is not installed: pip install 'fastadv[{extra}]'") from error
