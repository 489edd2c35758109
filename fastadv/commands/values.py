"""What the text of an option means, lengths in 1/255 and lists, and how the help shows its default."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from fastadv.data.classes import pieces
from fastadv.names import instead
from fastadv.units import in_255ths


def budget_255(text: str, most: float = 255) -> float:
    """A length in 1/255 units, "8" or "8/255", as 8.0, and at most `most`.

    A number below 0.5 must be written as a fraction of 255: it is probably meant in [0, 1]. Only --eps is read so
    strictly: a step or a noise below 0.5/255 is nothing unusual.

    Raises:
        argparse.ArgumentTypeError: not such a number, or outside [0, most].
    """
    value = _in_255ths(text, most)
    if "/" not in text and 0 < value < 0.5:
        raise argparse.ArgumentTypeError(
            f"eps is in units of 1/255, and {text} of them is next to nothing; "
            f"{text} of the range [0, 1] is --eps {255 * value:.4g}. To mean it, write {text}/255"
        )
    return value


def eps_budget(text: str) -> float:
    """As `budget_255`, as a float in [0, 1]."""
    return budget_255(text) / 255


def budget(text: str) -> float:
    """A length in 1/255 units, "8" or "8/255", as a float in [0, 1].

    Raises:
        argparse.ArgumentTypeError: not such a number, or outside [0, 255].
    """
    return _in_255ths(text) / 255


def _in_255ths(text: str, most: float = 255) -> float:
    try:
        return in_255ths(text, most)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def names(text: str) -> list[str]:
    """Names with commas between them; one that has commas itself in double quotes: '"a,b",c'.

    Raises:
        argparse.ArgumentTypeError: an empty name.
    """
    found = [quoted or plain for quoted, plain in pieces(text)]
    if not all(found):
        raise argparse.ArgumentTypeError(f"names with a comma or a space between them, got {text!r}")
    return found


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    """What reads one of these names.

    Args:
        known: the names.

    Raises (when it is called):
        argparse.ArgumentTypeError: another name.
    """

    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"unknown {text!r}{instead(text, known)}")
        return text

    return read


def eps_budgets(text: str) -> list[float]:
    """Budgets in Linf or L2 with commas between them, as floats; the attacks refuse one in Linf above 255/255."""
    return [budget_255(part, most=math.inf) / 255 for part in names(text)]


def budgets_255(text: str) -> list[float]:
    """Budgets with commas between them, each as of `budget_255`."""
    return [budget_255(part) for part in names(text)]


class Listed(argparse.Action):
    """An option that takes a list, with commas or spaces: "4,8", "4 8" and "4, 8" mean the same.

    Args:
        option_strings: of argparse.
        dest: of argparse.
        type: from the list's text, with commas, to its value.
        default: text of a list, which the help shows as it is, or None.
        options: of argparse.
    """

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        type: Callable[[str], Any],
        default: str | None = None,
        **options: Any,
    ):
        super().__init__(option_strings, dest, nargs="+", default=default and type(default), **options)
        self.read, self.default_text = type, default

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        *before, last = values
        text = ",".join([*(word.rstrip().removesuffix(",") for word in before), last])
        try:
            setattr(namespace, self.dest, self.read(text))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def default_of(action: argparse.Action) -> str | None:
    """The default of an option as it would be written on the command line; None where it has none, as a flag has."""
    default = getattr(action, "default_text", action.default)
    if default is None or default is False or default == argparse.SUPPRESS or not action.option_strings:
        return None
    return f"{default:g}" if isinstance(default, float) else str(default)


class WithDefaults(argparse.HelpFormatter):
    """Shows the defaults that options have."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = default_of(action)
        return action.help if default is None else f"{action.help} (default: {default.replace('%', '%%')})"
