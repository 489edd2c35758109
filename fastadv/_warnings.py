"""Warnings that name a line of the user's program."""

import sys
import warnings

# Modules through which fastadv calls itself; their frames lie between a warning and the user's line.
_BETWEEN = ("fastadv", "torch", "contextlib", "functools", "importlib")


def warn(message: str | Warning, category: type[Warning] = UserWarning) -> None:
    """Warn at the line from which the user's program called fastadv, however deep the fault was found.

    Python shows a warning once for each line and can be told to ignore those of a module: both need that line.

    Args:
        message: what is odd and what to do; or a warning that was caught before.
        category: the kind of warning; a caught one has its own.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    names = frame.f_globals
    registry = names.setdefault("__warningregistry__", {})
    warnings.warn_explicit(
        message, category, frame.f_code.co_filename, frame.f_lineno, names.get("__name__", "__main__"), registry
    )
