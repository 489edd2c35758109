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
                found += [Path(entry)] if hidden or is_counted(entry.name) else []
            elif is_counted(entry.name):
                inside.append(entry)
        for entry in sorted(inside, key=lambda entry: entry.name, reverse=True):  # that the first is entered first
            (linked if entry.is_symlink() else own).append(Path(entry))
    return sorted(found, key=sort_key)


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, in the order of their names: no hidden ones, no links to it or to what it lies in."""
    inside = [entry for entry in _entries(folder) if is_counted(entry.name) and _leads_to_folder(entry)]
    loops = {
        entry.name
        for entry in inside
        if entry.is_symlink() and folder.resolve().is_relative_to(os.path.realpath(entry))
    }
    return sorted((Path(entry) for entry in inside if entry.name not in loops), key=sort_key)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    # DirEntry.is_dir asks the disk for links alone, but raises for a link to itself.
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def visible(folder: Path) -> list[Path]:
    """The files and folders in a folder that count, in the order of their names."""
    return sorted((path for path in folder.iterdir() if is_counted(path.name)), key=sort_key)


def is_counted(name: str) -> bool:
    """Whether a file or folder counts: hidden ones, and what macOS packs beside the pictures, do not."""
    return not name.startswith(".") and name != "__MACOSX"


def sort_key(path: Path) -> tuple[str, ...]:
    """The names in a path, by which paths are sorted."""
    # One name can be stored in two ways ("é" as one character or as two), which differs between systems.
    return tuple(unicodedata.normalize("NFC", part) for part in path.parts)
