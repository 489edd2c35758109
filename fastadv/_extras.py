"""Imports packages that only some parts of fastadv need."""

import importlib
from importlib.metadata import version
from types import ModuleType


def require(module: str, extra: str = "train") -> ModuleType:
    """Import a module of a package that an extra of fastadv installs.

    Args:
        module: the name of the module.
        extra: the name of the extra.

    Raises:
        ImportError: the package is not installed, or broken; the message says what to do.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            raise ImportError(f"{error.name} is not installed: pip install 'fastadv[{extra}]'") from error
        raise ImportError(_broken(module, error)) from error


def _broken(module: str, error: BaseException) -> str:
    """What to say of a package that is installed and cannot be imported: the first error, and a way out."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    why = f"{module} is installed and cannot be imported ({type(chain[-1]).__name__}: {chain[-1]})"
    if not any("torchvision" in str(each) for each in chain):
        return f"{why}: install it again"
    return (
        f"{why}: it imports torchvision, which is broken here, and probably built for another torch than "
        f"{version('torch')}, which is installed. Install the torchvision that fits, from where this torch came: pip "
        "install --force-reinstall --no-deps torchvision"
    )
