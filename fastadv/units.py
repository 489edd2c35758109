"""Lengths in units of 1/255, as people write them."""

import math


def in_255ths(text: str) -> float:
    """A length in units of 1/255, "8" or "8/255", as 8.0.

    Raises:
        ValueError: not such a number, or outside [0, 255].
    """
    number, slash, unit = text.partition("/")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 255 or (slash and unit.strip() != "255"):
        raise ValueError(f"{text!r} is not a number of 1/255, such as 8 or 8/255")
    return value
