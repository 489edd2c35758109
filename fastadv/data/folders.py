"""Folders of pictures, one for each class."""

import os
import re
from pathlib import Path

import torch

from fastadv._warnings import warn
from fastadv.data.pictures import Picture, extensions
from fastadv.data.source import DataSource, Part, judging
from fastadv.data.walking import files_below, folders_in, is_counted, sort_key, visible
from fastadv.names import instead

_PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_LAYOUT = (
    "photos/CLASS/*.jpg, or photos/train/CLASS/*.jpg and, if you have them, photos/val/CLASS and photos/test/CLASS"
)


def folders(root: Path, judge: str | None = None) -> DataSource:
    """The pictures below `root`, nothing read yet: root/CLASS/..., or root/train/CLASS/... and val, test beside it.

    The classes are those of the training part, sorted by name. Where a folder holds nothing but one folder of folders,
    as a folder that was packed twice, or where the parts are called such as seg_train and seg_test, the classes below
    are taken, with a warning. Hidden files and folders do not count; other files that are no pictures are left out with
    a warning, and so are parts besides the training part that have pictures and no classes.

    Args:
        root: the folder.
        judge: None: for training; "test" or "all": to judge a model, see `judging`, which needs no training part.

    Raises:
        ValueError: no pictures, a class without pictures, a class that is not in the training part, or parts in the
            folders of the classes.
    """
    endings = extensions()
    places = _found(root, endings, training=judge is None)
    others = [path for path in visible(root) if not any(place.is_relative_to(path) for place in places.values())]
    others = [] if root in places.values() else others
    for part in [part for part, place in places.items() if part != "train" and not folders_in(place)]:
        if _has_pictures(places[part], endings) and len(places) > 1:
            warn(f"{places.pop(part)} has pictures of no class: the {part} part is left out")
    contents = {}
    for part in judging(places, judge):
        contents[part], left_out = _classes(places[part], endings)
        if not any(contents[part].values()):
            raise ValueError(
                f"{places[part]} has no folders with pictures{_instead(places[part])}; the layout is {_LAYOUT}"
            )
        others += left_out
    _warn_of_levels(root, places, endings)
    if judge is None:
        names = tuple(contents["train"])
    else:
        names = tuple(sorted({name for found in contents.values() for name, paths in found.items() if paths}))
        contents = {part: {name: paths for name, paths in found.items() if paths} for part, found in contents.items()}
    parts = {part: _part(found, names, places[part]) for part, found in contents.items()}
    if others:
        warn(f"left out, no picture of a class: {len(others)}, such as {others[0]}")
    return DataSource(parts, names)


def _instead(place: Path) -> str:
    """Words for an error: which files there are, and what to do where they are a set in another layout."""
    kinds = sorted({path.suffix.lower() for path in files_below(place) if path.suffix})
    if not kinds:
        return ""
    ways = {
        ".parquet": "of parquet files give the folder that holds train*.parquet",
        ".arrow": "a set that save_to_disk wrote can be written as train.parquet by to_parquet",
        ".tar": "unpack archives first",
        ".zip": "unpack archives first",
        ".gz": "unpack archives first",
    }
    found = next((f" ({way})" for kind, way in ways.items() if kind in kinds), "")
    return f", but files {', '.join(kinds[:5])}{found}"


def _found(root: Path, endings: frozenset[str], training: bool) -> dict[str, Path]:
    """The folder of each part that holds the classes' folders; `root` or one below it where there are no parts."""
    places = _places(root, endings, training)
    if places:
        return {part: _innermost(place, endings) for part, place in places.items()}
    inner = _innermost(root, endings)
    return {"train": root} if inner == root else _found(inner, endings, training)


def _innermost(folder: Path, endings: frozenset[str]) -> Path:
    """Down to the first folder that holds more than one folder without pictures of its own."""
    inside = folders_in(folder)
    if len(inside) > 1 or any(not folders_in(path) or _has_pictures(path, endings) for path in (folder, *inside)):
        return folder
    return _innermost(inside[0], endings)


def _places(root: Path, endings: frozenset[str], training: bool) -> dict[str, Path]:
    """The folders of the parts; empty where they are classes.

    A folder train with pictures of its own is a class called so, unless a part with classes lies beside it. A folder
    seg_train is a part only where it and one like seg_test have a class in common. What is not for `training` may have
    test and val alone, with nothing else beside them.
    """
    folders = folders_in(root)
    found = {part: [path for path in folders if path.name.casefold() in names] for part, names in _PARTS.items()}
    holders = [path for places in found.values() for path in places if folders_in(path)]
    train = next(iter(found["train"]), None)
    if train not in holders or (len(holders) == 1 and _has_pictures(train, endings)):
        whole = [path for path in holders if path != train and not _has_pictures(path, endings)]
        nothing_else = len(folders) == sum(map(len, found.values()))
        if training and len(folders) > 1 and nothing_else:
            raise ValueError(
                f"{root} has parts without classes, or classes without a training part: the layout is {_LAYOUT}"
            )
        if not training and whole and nothing_else:
            found = {part: [path for path in places if path in whole] for part, places in found.items()}
        else:
            found = _similar(folders, endings)
    for places in found.values():
        if len(places) > 1:
            raise ValueError(f"{root} has both {places[0].name} and {places[1].name}: leave one")
    return {part: places[0] for part, places in found.items() if places}


def _similar(folders: list[Path], endings: frozenset[str]) -> dict[str, list[Path]]:
    """The parts whose names have theirs as a word, such as seg_train and seg_test; empty where they are none."""
    holders = [path for path in folders if folders_in(path) and not _has_pictures(path, endings)]
    words = {path: set(re.split(r"[\W_]+", path.name.casefold())) for path in holders}
    found = {part: [path for path in holders if words[path].intersection(names)] for part, names in _PARTS.items()}
    classes = [
        {path.name for place in places for path in folders_in(_innermost(place, endings))} for places in found.values()
    ]
    return found if classes[0] & (classes[1] | classes[2]) else {}


def _warn_of_levels(root: Path, places: dict[str, Path], endings: frozenset[str]) -> None:
    """Warn where the classes' folders were not plainly named as such, or may themselves hold the folders of classes."""
    plain = {
        part: place == root or (place.parent == root and place.name.casefold() in _PARTS[part])
        for part, place in places.items()
    }
    if not all(plain.values()):
        taken = ", ".join(f"{part}: {place.relative_to(root)}" for part, place in places.items())
        warn(f"the folders in {root} are not the classes: took those in these folders ({taken})")
    first = next(iter(places.values()))
    classes = folders_in(first)
    if len(classes) < 2 or any(_has_pictures(path, endings) for path in classes):
        return
    inside = [[path.name for path in folders_in(path)] for path in classes]
    known = {name for names in _PARTS.values() for name in names}
    if known.issuperset(name.casefold() for names in inside for name in names):
        raise ValueError(
            f"{first} has the parts {', '.join(inside[0])} in the folders of its classes: the layout is {_LAYOUT}"
        )
    if all(len(names) > 1 for names in inside):
        warn(
            f"the classes are {classes[0].name}, {classes[1].name} and so on, and the folders in them ({inside[0][0]}, "
            f"{inside[0][1]} and so on) are not told apart: if those are the classes, give {classes[0]}, or folders "
            "train and test that hold them"
        )


def _has_pictures(folder: Path, endings: frozenset[str]) -> bool:
    """Whether pictures lie in the folder itself: those in its folders do not count."""
    paths = (path for path in folder.iterdir() if is_counted(path.name))
    return any(path.suffix.lower() in endings and not os.path.isdir(path) for path in paths)


def _classes(place: Path, endings: frozenset[str]) -> tuple[dict[str, list[Path]], list[Path]]:
    """The pictures of each class, both sorted, and the other files."""
    inside = folders_in(place)
    found: dict[str, list[Path]] = {}
    others = [path for path in visible(place) if path not in inside]
    for folder in inside:
        files = files_below(folder)
        pictures = found.setdefault(sort_key(folder)[-1], [])  # which may be the name of two folders
        pictures += [path for path in files if path.suffix.lower() in endings]
        others += [path for path in files if path.suffix.lower() not in endings]
    return found, others


def _part(found: dict[str, list[Path]], names: tuple[str, ...], place: Path) -> Part:
    for name, paths in found.items():
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes that are no UTF-8, which no file could hold
            raise ValueError(f"the class {name!r} in {str(place)!r} has a name that is not UTF-8: rename its folder")
        if not paths:
            raise ValueError(f"the class {name!r} has no pictures in {place}: add some, or delete its folder")
        if name not in names:
            raise ValueError(f"{place} has a class {name!r} that the training part lacks{instead(name, names)}")
    labels = [names.index(name) for name, paths in found.items() for _ in paths]
    return Part([Picture(str(path)) for paths in found.values() for path in paths], torch.tensor(labels))
