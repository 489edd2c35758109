"""The files below a folder, whatever links and names there are."""

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path


def files_below(
    folder: Path, *, hidden: bool = False, onerror: Callable[[OSError], object] | None = None
) -> list[Path]:
    """All files below `folder`, in the order of their names; a link that leads nowhere is a file too.

    A folder is entered once, however many links lead to it, and under its own name rather than a link's. Hidden folders
    are left out.

    Args:
        folder: where to begin.
        hidden: whether hidden files count.
        onerror: gets the error of a folder that cannot be read, which is then passed over; None: it is raised.

    Raises:
        OSError: a folder cannot be read, and there is no `onerror`.
    """
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    own, linked = [folder], list[Path]()
    while own or linked:
        place = (own or linked).pop()
        try:
            status = os.stat(place)
            entries = [] if (status.st_dev, status.st_ino) in entered else _entries(place)
        except OSError as error:
            if onerror is None:
                raise
            onerror(error)
            continue
        entered.add((status.st_dev, status.st_ino))
        inside = []
        for entry in entries:
            if not _leads_to_folder(entry):
                found += [Path(entry)] if hidden or counts(entry.name) else []
            elif counts(entry.name):
                inside.append(entry)
        for entry in sorted(inside, key=lambda entry: entry.name, reverse=True):  # that the first is entered first
            (linked if entry.is_symlink() else own).append(Path(entry))
    return sorted(found, key=key)


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, in the order of their names: no hidden ones, no links to it or to what it lies in."""
    inside = [entry for entry in _entries(folder) if counts(entry.name) and _leads_to_folder(entry)]
    loops = {
        entry.name
        for entry in inside
        if entry.is_symlink() and folder.resolve().is_relative_to(os.path.realpath(entry))
    }
    return sorted((Path(entry) for entry in inside if entry.name not in loops), key=key)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    # DirEntry.is_dir asks the disk for links alone, but raises for a link to itself.
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def visible(folder: Path) -> list[Path]:
    """What is in a folder and counts, in the order of the names."""
    return sorted((path for path in folder.iterdir() if counts(path.name)), key=key)


def counts(name: str) -> bool:
    """Not hidden, nor what macOS packs beside the pictures."""
    return not name.startswith(".") and name != "__MACOSX"


def key(path: Path) -> tuple[str, ...]:
    """What paths are sorted by."""
    # One name can be stored in two ways ("é" as one character or as two), which differs between systems.
    return tuple(unicodedata.normalize("NFC", part) for part in path.parts)
