"""Writes files that are never half written, even where the process is killed, and checks the formats of files."""

import os
from pathlib import Path


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace a file, or make it. A reader finds the old content or the new one, never a part.

    The content is written to the temporary file {path}.new and flushed to the disk. Then that file is renamed.

    Args:
        path: the file; a missing folder is made.
        content: the bytes.

    Raises:
        OSError: the file cannot be written, as on a full disk; the old file is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # the error of a full disk does not name the file
        raise
    if os.name == "posix":  # the new name, too, must be on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_format(what: str, found: object, known: int, oldest: int | None = None) -> None:
    """Refuse a file of a format that this version of fastadv does not read.

    Args:
        what: the file, in words.
        found: the entry "format" of the file, which may be anything.
        known: the newest format that is read.
        oldest: the oldest format that is read; None means `known` alone.

    Raises:
        FormatError: the format is not read; the message says which version to install.
    """
    if isinstance(found, int) and (known if oldest is None else oldest) <= found <= known:
        return
    newer = isinstance(found, int) and found > known
    todo = "install a newer fastadv, such as the one that wrote it" if newer else "install the fastadv that wrote it"
    reads = known if oldest is None else f"{oldest} to {known}"
    raise FormatError(f"{what} has the format {found}, this fastadv reads {reads}: {todo}")


class FormatError(ValueError):
    """Another version of fastadv wrote a file, in a format that this version does not read."""
