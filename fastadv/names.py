"""Names: what a message says of one that a table does not have, and one for each of several that are called alike."""

import difflib
import itertools
from collections.abc import Iterable

MOST = 40  # names in a message


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like `name`, whatever its case; None where none is."""
    lower = {each.lower(): each for each in reversed(list(known))}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=cutoff)
    return lower[near[0]] if near else None


def instead(name: object, known: Iterable[object]) -> str:
    """The names that there are, and the nearest of them: "; there are fgsm, pgd. Did you mean pgd?".

    It follows what is wrong: f"unknown attack {name!r}{instead(name, PRESETS)}".

    Args:
        name: that is not known.
        known: the names that are.
    """
    names = list(map(str, known))
    near = nearest(str(name), names)
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    listed = f"; there are {', '.join(names[:MOST]) or 'none'}{more}"
    return f"{listed}. Did you mean {near}?" if near else listed


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """The names, a repeated one with a number: classes are told apart by their names alone."""
    found: dict[str, None] = {}
    for name in names:
        called = (name if i == 1 else f"{name} ({i})" for i in itertools.count(1))
        found[next(each for each in called if each not in found)] = None
    return tuple(found)
