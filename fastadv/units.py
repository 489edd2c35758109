"""Lengths in units of 1/255, as people write them."""

import math


def in_255ths(text: str, most: float = 255) -> float:
    """A length in units of 1/255, "8" or "8/255", as 8.0.

    Args:
        text: the length.
        most: the largest that there can be: 255 of one pixel value; an L2 norm of all of them has no such bound.

    Raises:
        ValueError: not such a number, or outside [0, most].
    """
    number, slash, unit = text.partition("/")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (0 <= value <= most and math.isfinite(value)) or (slash and unit.strip() != "255"):
        raise ValueError(f"{text!r} is not a number of 1/255, such as 8 or 8/255")
    return value
