"""Folders of pictures, one for each class."""

import os
import unicodedata
import warnings
from pathlib import Path

import torch

from fastadv.data.pictures import Picture, extensions
from fastadv.data.source import Part, Source

_PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_LAYOUT = (
    "photos/CLASS/*.jpg, or photos/train/CLASS/*.jpg and, if you have them, photos/val/CLASS and photos/test/CLASS"
)


def folders(root: Path) -> Source:
    """The pictures below `root`, nothing read yet: root/CLASS/..., or root/train/CLASS/... and val, test beside it.

    The classes are those of the training part, sorted by name. Hidden files and folders do not count; other files
    that are no pictures are left out with a warning.

    Raises:
        ValueError: no pictures, a class without pictures, or a class that is not in the training part.
    """
    endings = extensions()
    places = _places(root, endings) or {"train": root}
    others = [] if root in places.values() else [path for path in _visible(root) if path not in places.values()]
    contents = {}
    for part, place in places.items():
        contents[part], left_out = _classes(place, endings)
        if not any(contents[part].values()):
            raise ValueError(f"{place} has no folders with pictures; the layout is {_LAYOUT}")
        others += left_out
    names = tuple(contents["train"])
    parts = {part: _part(found, names, places[part]) for part, found in contents.items()}
    if others:
        warnings.warn(f"left out, no picture of a class: {len(others)}, such as {others[0]}", stacklevel=4)
    return Source(parts, names)


def _places(root: Path, endings: frozenset[str]) -> dict[str, Path]:
    """The folders of the parts; empty where they are classes.

    A folder train with pictures of its own is a class called so, unless a part with classes lies beside it.
    """
    folders = [path for path in _visible(root) if path.is_dir()]
    found = {part: [path for path in folders if path.name.casefold() in names] for part, names in _PARTS.items()}
    holders = [path for places in found.values() for path in places if any(p.is_dir() for p in _visible(path))]
    train = next(iter(found["train"]), None)
    if train in holders and (len(holders) > 1 or not any(p.suffix.lower() in endings for p in _visible(train))):
        for places in found.values():
            if len(places) > 1:
                raise ValueError(f"{root} has both {places[0].name} and {places[1].name}: leave one")
        return {part: places[0] for part, places in found.items() if places}
    if len(folders) > 1 and len(folders) == sum(map(len, found.values())):
        raise ValueError(
            f"{root} has parts without classes, or classes without a training part: the layout is {_LAYOUT}"
        )
    return {}


def _visible(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_key)


def _key(path: Path) -> tuple[str, ...]:
    # One name can be stored in two ways ("é" as one character or as two), which differs between systems.
    return tuple(unicodedata.normalize("NFC", part) for part in path.parts)


def _classes(place: Path, endings: frozenset[str]) -> tuple[dict[str, list[Path]], list[Path]]:
    """The pictures of each class, both sorted, and the other files."""
    found, others = {}, []
    for entry in _visible(place):
        if not entry.is_dir():
            others.append(entry)
            continue
        files = _files(entry)
        pictures = found.setdefault(_key(entry)[-1], [])  # which may be the name of two folders
        pictures += [path for path in files if path.suffix.lower() in endings]
        others += [path for path in files if path.suffix.lower() not in endings]
    return found, others


def _files(folder: Path) -> list[Path]:
    files = []
    for base, inner, names in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        files += [Path(base, name) for name in names if not name.startswith(".")]
    return sorted(files, key=_key)


def _part(found: dict[str, list[Path]], names: tuple[str, ...], place: Path) -> Part:
    for name, paths in found.items():
        if not paths:
            raise ValueError(f"the class {name!r} has no pictures in {place}: add some, or delete its folder")
        if name not in names:
            raise ValueError(f"{place} has a class {name!r} that the training part lacks; it has {', '.join(names)}")
    labels = [names.index(name) for name, paths in found.items() for _ in paths]
    return Part([Picture(str(path)) for paths in found.values() for path in paths], torch.tensor(labels))
