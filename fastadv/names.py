"""What a message says of a name that a table does not have."""

import difflib
from collections.abc import Iterable

MOST = 40  # names in a message


def instead(name: object, known: Iterable[object]) -> str:
    """The names that there are, and the nearest of them: "; there are fgsm, pgd. Did you mean pgd?".

    It follows what is wrong: f"unknown attack {name!r}{instead(name, PRESETS)}".

    Args:
        name: that is not known.
        known: the names that are.
    """
    names = list(map(str, known))
    lower = {each.lower(): each for each in reversed(names)}
    near = difflib.get_close_matches(str(name).lower(), lower, n=1)
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    listed = f"; there are {', '.join(names[:MOST]) or 'none'}{more}"
    return f"{listed}. Did you mean {lower[near[0]]}?" if near else listed
