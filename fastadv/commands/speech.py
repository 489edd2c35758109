"""How much a command says, and where: results on stdout, what happens meanwhile on stderr."""

import argparse
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("fastadv")


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add -q and -v: they may stand before the command or after it."""
    options = parser.add_mutually_exclusive_group()
    common: dict[str, Any] = {"action": "store_const", "dest": "verbosity", "default": argparse.SUPPRESS}
    options.add_argument(
        "-q", "--quiet", const=logging.WARNING, help="errors, warnings and what was asked for", **common
    )
    options.add_argument("-v", "--verbose", const=logging.DEBUG, help="more, with times, and tracebacks", **common)


def say(text: str) -> None:
    """Print what is nice to know; not with -q."""
    if not is_quiet():
        print(text, flush=True)


def is_quiet() -> bool:
    """Whether -q was given."""
    return not logger.isEnabledFor(logging.INFO)


def is_verbose() -> bool:
    """Whether -v was given."""
    return logger.isEnabledFor(logging.DEBUG)


@contextmanager
def speaking(verbosity: int) -> Iterator[None]:
    """Until the end, show log lines from this level on, a warning as one line, and names in any characters.

    Args:
        verbosity: a level of logging.
    """
    logging.basicConfig(format="%(asctime)s %(message)s" if verbosity <= logging.DEBUG else "%(message)s")
    level, format_warning = logger.level, warnings.formatwarning
    logger.setLevel(verbosity)
    if not is_verbose():
        warnings.formatwarning = lambda message, *_, **__: f"fastadv: warning: {message}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that is not UTF-8, or a terminal that is not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        warnings.formatwarning = format_warning
        logger.setLevel(level)
