"""The choice of classes: from a text or names to labels, and from a part to its images of these classes."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Integral, Real

import torch

from fastadv._warnings import warn
from fastadv.data.source import AnyPart
from fastadv.names import instead

# A name in quotes, or what there is, up to the next comma.
_PIECE = r'(?:\s*"((?:[^"]|"")*)"\s*(?=,)|([^,]*)),'


Chosen = int | str | range  # a label, a name, or labels written as 5-9, which may be a name


def class_list(text: str) -> list[Chosen]:
    """Labels such as "5-9" or "0,3,5-7", or names such as "cat,dog", as a list.

    One that is not written as a label is, such as 01 or 9-5, makes all of them names. A name in double quotes is taken
    as it stands, commas and all: '"salt, rock",pepper'; a double quote in it is written twice. Labels such as 5-9 are
    a range: only the set can tell whether its classes are called so.
    """
    parts = pieces(text.rstrip().removesuffix(","))
    ends = [None if quoted else _label_range(plain) for quoted, plain in parts]
    ranges = [each for each in ends if each is not None]
    if len(ranges) < len(ends):
        return [quoted or plain for quoted, plain in parts]
    return [first if first == last else range(first, last + 1) for first, last in ranges]


def pieces(text: str) -> list[tuple[str, str]]:
    """What stands between the commas of a list: (what is in double quotes, ""), or ("", what is not)."""
    return [(quoted.replace('""', '"'), plain.strip()) for quoted, plain in re.findall(_PIECE, f"{text},")]


def _label_range(text: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"(0|[1-9][0-9]*)(?:-([1-9][0-9]*))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    return (first, last) if first <= last else None


def warn_of_twins(names: Iterable[str]) -> None:
    """Warn of classes whose names differ in capitals or spaces alone, such as "cat" and "Cat"."""
    twins: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        twins["".join(name.split()).casefold()].append(name)
    for same in twins.values():
        if len(same) > 1:
            warn(
                f"the classes {', '.join(map(repr, same))} differ in capitals or spaces alone, and count as "
                f"{len(same)}: merge them if they are one"
            )


def labels_of(classes: Sequence[Chosen], names: tuple[str, ...]) -> list[int]:
    """The labels of the classes asked for, by their names or labels. Numbers and ranges are names where all are.

    Texts that are no names may be pieces of a name with commas, such as "salt, rock", which a list was cut at.

    Args:
        classes: that are asked for.
        names: of the set's classes; the label of a class is its place.

    Raises:
        ValueError: a class is not there, is asked for twice, may be meant in two ways, or there is none.
    """
    if isinstance(classes, str) or any(isinstance(chosen, Real) and not _is_whole(chosen) for chosen in classes):
        raise ValueError(f"classes must be a list of names or of whole numbers, got {classes!r}")
    meant = _by_names(classes, names)
    if not meant:
        meant = _without_ranges(classes, names)
        meant = _by_names(meant, names) or _with_commas(meant, names)
    for chosen in meant:
        if isinstance(chosen, str) and chosen not in names:
            hint = ' (names with commas in double quotes: "salt, rock",pepper)' if "," in "".join(names) else ""
            raise ValueError(f"there is no class {chosen!r}{instead(chosen, names)}{hint}")
        if isinstance(chosen, str):
            continue
        called = [name for name in names if name.isdecimal() and int(name) == chosen]
        there = 0 <= chosen < len(names)
        if not called and not there:
            raise ValueError(f"class {chosen} has no training or no test images; there are 0 to {len(names) - 1}")
        if called and not (there and called == [names[chosen]]):
            label = f"the label {chosen}, which is " + (f"the class called {names[chosen]}" if there else "no class's")
            raise ValueError(
                f"class {chosen} may be the one called {called[0]} or {label}: give all classes by their names, "
                f"{', '.join(names)}"
            )
    labels = [names.index(chosen) if isinstance(chosen, str) else int(chosen) for chosen in meant]
    if not labels or len(set(labels)) != len(labels):
        raise ValueError(f"classes must be different and at least one, got {list(classes)}")
    return labels


def _by_names(classes: Sequence[Chosen], names: tuple[str, ...]) -> list[int | str]:
    """The classes by their names, where all are called as they are written: folders may be called 1, 2 or 0-2, 4-6."""
    written = [_written(chosen) for chosen in classes]
    return [*written] if all(each in names for each in written) else []


def _written(chosen: Chosen) -> str:
    return f"{chosen[0]}-{chosen[-1]}" if isinstance(chosen, range) else str(chosen)


def _without_ranges(classes: Sequence[Chosen], names: tuple[str, ...]) -> list[int | str]:
    """The classes, with the labels of each range in its place.

    Raises:
        ValueError: a class is called as a range is written.
    """
    found: list[int | str] = []
    for chosen in classes:
        if not isinstance(chosen, range):
            found.append(chosen)
        elif _written(chosen) in names:
            raise ValueError(
                f"{_written(chosen)} may be the class called so or the labels {chosen[0]} to {chosen[-1]}: give all "
                f"classes by their names, this one in double quotes; there are {', '.join(names)}"
            )
        else:
            found += chosen
    return found


def _is_whole(number: Real) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _with_commas(classes: list[int | str], names: tuple[str, ...]) -> list[int | str]:
    """The classes, neighbours that are pieces of one name as that name: "salt", "rock" as "salt, rock"."""
    pieces: dict[tuple[int | str, ...], str] = {
        tuple(piece.strip() for piece in name.split(",")): name for name in names
    }
    found, rest = [], list(classes)
    while rest:
        count = next((n for n in range(len(rest), 0, -1) if tuple(rest[:n]) in pieces), 1)
        found.append(pieces.get(tuple(rest[:count]), rest[0]))
        del rest[:count]
    return found


def selected(part: AnyPart, labels: Sequence[int]) -> AnyPart:
    """The images of these labels, which become 0, 1, ... in their order."""
    new = torch.full((1 + max([*labels, *part.labels.unique().tolist()], default=0),), -1)
    new[list(labels)] = torch.arange(len(labels))
    kept = part.take((new[part.labels] >= 0).nonzero()[:, 0])
    return replace(kept, labels=new[kept.labels])
